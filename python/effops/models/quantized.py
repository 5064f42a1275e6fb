"""Quantised checkpoints of Hugging Face: linear layers as GPTQ and AWQ store them.

Both hold integers ``n``, zeros ``z`` and float16 steps ``s`` of groups of inputs, and a weight is ``(n - z) s``. GPTQ
packs eight numbers of one output along the inputs and stores zeros less one (``checkpoint_format`` gptq_v2: as they
are); its ``g_idx`` says which group an input belongs to. AWQ packs eight outputs of one input, in the order
0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops.models.errors import CheckpointError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output j of eight is field _AWQ_ORDER[j] of the word


@dataclass(frozen=True)
class QuantizationConfig:
    """``quantization_config`` of a config.json."""

    method: str  # gptq or awq
    bits: int
    group_size: int  # -1: all inputs
    zero_less_one: bool = False

    @classmethod
    def read(cls, raw: Any, source: str) -> QuantizationConfig:
        """Raises CheckpointError for a method, a width or a layout that is not known."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(source, "quantization_config", f"expected an object, got {raw!r}")
        method: Any = raw.get("quant_method")
        bits: Any = raw.get("bits")
        group_size: Any = raw.get("group_size")
        if method not in ("gptq", "awq"):
            raise CheckpointError(source, "quantization_config", f"expected quant_method gptq or awq, got {method!r}")
        widths = (4, 8) if method == "gptq" else (4,)
        if bits not in widths:
            raise CheckpointError(source, "quantization_config", f"expected {widths} bits of {method}, got {bits!r}")
        if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise CheckpointError(source, "quantization_config", f"expected a group_size, got {group_size!r}")
        if method == "awq" and raw.get("version", "gemm") != "gemm":
            raise CheckpointError(source, "quantization_config", f"expected version gemm, got {raw['version']!r}")
        stored = raw.get("checkpoint_format", "gptq")
        if method == "gptq" and stored not in ("gptq", "gptq_v2"):
            raise CheckpointError(source, "quantization_config", f"expected gptq or gptq_v2, got {stored!r}")
        return cls(method, bits, group_size, method == "gptq" and stored == "gptq")


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
        zeros = _fields(qzeros, config.bits)
        if config.zero_less_one:
            zeros = zeros + 1
        if "g_idx" in tensors:
            order = _order(get("g_idx", (torch.int32, torch.int64), (inputs,)), groups, size, source)
    else:
        get("qweight", (torch.int32,), (inputs, outputs // a_word))
        rows, zeros = (_fields(t, 4).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for t in (qweight, qzeros))
    if order is not None:
        rows = rows[order]
    return StoredLinear(rows.T.unflatten(1, (groups, size)), scales.T.float(), zeros.T.float(), order)


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
