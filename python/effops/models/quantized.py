"""Quantised checkpoints of Hugging Face: linear layers as GPTQ and AWQ store them.

Both hold integers ``n``, zeros ``z`` and float16 steps ``s`` of groups of inputs, and a weight is ``(n - z) s``. GPTQ
packs eight numbers of one output along the inputs and stores zeros less one (the word less 0x11111111;
``checkpoint_format`` gptq_v2: as they are); its ``g_idx`` says which group an input belongs to. AWQ packs eight outputs
of one input, in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effops.models.checkpoint import TensorFiles
from effops.models.errors import CheckpointError
from effops.models.quantization_config import QuantizationConfig
from effops.nn import MLP, Attention, PackedLinear
from effops.ops.packed_weight import PackedWeight, from_numbers

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output j of eight is field _AWQ_ORDER[j] of the word


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer of N outputs: ``numbers`` int16 [N, groups, group], 0 to 2^bits - 1; ``scales`` and ``zeros``
    float32 [N, groups]; ``order`` int64 [K], the input that each place has, None where they are in order."""

    numbers: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None = None


def read_linear(tensors: Mapping[str, Tensor], config: QuantizationConfig, source: str) -> StoredLinear:
    """Of ``qweight``, ``qzeros``, ``scales`` and, of GPTQ, ``g_idx``. Raises CheckpointError where one is missing or
    has not the shape that the others say."""

    def get(name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in tensors:
            raise CheckpointError(source, name, "expected a tensor, got nothing")
        t = tensors[name]
        if t.dtype not in dtypes or (shape is not None and t.shape != shape):
            wanted = f"{'' if shape is None else f'{list(shape)} of '}{' or '.join(map(str, dtypes))}"
            raise CheckpointError(source, name, f"expected {wanted}, got {list(t.shape)} of {t.dtype}")
        return t

    a_word = 32 // config.bits
    scales = get("scales", (torch.float16, torch.bfloat16, torch.float32))
    if scales.dim() != 2 or scales.shape[1] % a_word:
        raise CheckpointError(source, "scales", f"expected [groups, multiple of {a_word}], got {list(scales.shape)}")
    groups, outputs = scales.shape
    qweight = get("qweight", (torch.int32,))
    inputs = qweight.shape[0] * (a_word if config.method == "gptq" else 1)
    size = inputs if config.group_size == -1 else config.group_size
    if inputs % size or groups != inputs // size:
        raise CheckpointError(source, "scales", f"expected {inputs / size:g} groups of {size} inputs, got {groups}")
    qzeros = get("qzeros", (torch.int32,), (groups, outputs // a_word))
    order = None
    if config.method == "gptq":
        get("qweight", (torch.int32,), (inputs // a_word, outputs))
        rows = _fields(qweight.T, config.bits).T  # [K, N]
        if config.zero_less_one:  # a word less a one in every field: a zero that is 0 borrows from the next
            qzeros = qzeros.long() + sum(1 << shift for shift in range(0, 32, config.bits))
        zeros = _fields(qzeros, config.bits)
        if "g_idx" in tensors:
            order = _order(get("g_idx", (torch.int32, torch.int64), (inputs,)), groups, size, source)
    else:
        get("qweight", (torch.int32,), (inputs, outputs // a_word))
        rows, zeros = (_fields(t, 4).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for t in (qweight, qzeros))
    if order is not None:
        rows = rows[order]
    return StoredLinear(rows.T.unflatten(1, (groups, size)), scales.T.float(), zeros.T.float(), order)


def place_quantized(model: nn.Module, files: TensorFiles, config: QuantizationConfig) -> set[str]:
    """Puts packed linear layers in the place of those of a decoder whose weights the files hold quantised; their biases
    are still to be loaded. Returns the names of the tensors that were read."""
    used: set[str] = set()
    layers: Any = model.get_submodule("layers")
    for i, layer in enumerate(layers):
        for block, child, parts in _PROJECTIONS:
            names = [f"model.layers.{i}.{block}.{part}" for part in parts]
            if f"{names[0]}.qweight" not in files.names():
                continue
            module = getattr(layer, block)
            if type(module) not in (Attention, MLP):
                raise CheckpointError(
                    str(files.source), names[0], f"expected a plain layer, got {type(module).__name__}"
                )
            stored = []
            for name in names:
                own = {n for n in files.names() if n.startswith(f"{name}.")} - {f"{name}.bias"}
                used |= own
                tensors = {n.removeprefix(f"{name}."): files.read(n) for n in own}
                stored.append(read_linear(tensors, config, f"{files.source}: {name}"))
            linear = getattr(module, child)
            if linear.bias is None:  # some writers add biases that are none
                biases = {f"{name}.bias" for name in names} & files.names()
                used |= {bias for bias in biases if not files.read(bias).any()}
            packed = _joined(stored, config.bits, f"{files.source}: {names[0]}")
            if packed.shape != linear.weight.shape:
                got = f"expected a weight of {list(linear.weight.shape)}, got {list(packed.shape)}"
                raise CheckpointError(str(files.source), names[0], got)
            setattr(module, child, PackedLinear(packed, linear.bias).to(linear.weight.device))
    return used


_PROJECTIONS = (
    ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", "o_proj", ("o_proj",)),
    ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    ("mlp", "down_proj", ("down_proj",)),
)


def _joined(parts: Sequence[StoredLinear], bits: int, source: str) -> PackedWeight:
    """Layers of the same inputs as one, outputs after outputs."""
    first = parts[0].order
    for part in parts[1:]:
        same = part.order is None if first is None else part.order is not None and torch.equal(first, part.order)
        if not same:
            raise CheckpointError(
                source, "g_idx", "expected one order of inputs for layers that are fused, got several"
            )
    numbers, scales, zeros = (torch.cat([getattr(p, name) for p in parts]) for name in ("numbers", "scales", "zeros"))
    middle = 128 if bits == 8 else 0  # int8 has a sign
    try:
        return from_numbers(numbers - middle, scales, zeros - middle, f"int{bits}", first)
    except ValueError as error:
        raise CheckpointError(source, "qzeros", str(error)) from None


def _fields(words: Tensor, bits: int) -> Tensor:
    """[rows, words] as their numbers [rows, words * 32 / bits], int16, the least significant first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.int16).flatten(1)


def _order(g_idx: Tensor, groups: int, size: int, source: str) -> Tensor | None:
    group = g_idx.long()
    counts = torch.bincount(group.clamp(0, groups - 1), minlength=groups)
    if bool((group < 0).any() or (group >= groups).any() or (counts != size).any()):
        raise CheckpointError(source, "g_idx", f"expected {size} inputs in each of {groups} groups, got other numbers")
    order = group.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
