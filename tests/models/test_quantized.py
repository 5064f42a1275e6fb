"""GPTQ and AWQ tensors, packed here by their definitions, come back as the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from effops.models.errors import CheckpointError
from effops.models.quantized import QuantizationConfig, read_linear
from torch import Tensor

N, K, GROUP = 24, 32, 16


def drawn(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [K, N]; scales and zeros [groups, N]."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (K, N), generator=generator)
    zeros = torch.randint(1, 2**bits, (K // GROUP, N), generator=generator)
    return numbers, torch.rand(K // GROUP, N, generator=generator).half() + 0.5, zeros


def word(fields: list[int], bits: int) -> int:
    total = sum(f << (bits * i) for i, f in enumerate(fields))
    return total - 2**32 if total >= 2**31 else total


def pack(rows: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last dimension, so many numbers a word."""
    each = 32 // bits
    order = order or tuple(range(each))
    return torch.tensor(
        [[word([row[i + j] for j in order], bits) for i in range(0, len(row), each)] for row in rows.tolist()]
    ).int()


def weight_of(stored, bits: int) -> Tensor:
    """[N, K], inputs in their places."""
    w = ((stored.numbers.float() - stored.zeros[..., None]) * stored.scales[..., None]).flatten(1)
    if stored.order is None:
        return w
    out = torch.empty_like(w)
    out[:, stored.order] = w
    return out


@pytest.mark.parametrize("order", ("in order", "by importance"))
@pytest.mark.parametrize("stored_as", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("bits", (4, 8))
def test_gptq(bits, stored_as, order):
    numbers, scales, zeros = drawn(bits)
    g_idx = torch.arange(K) // GROUP
    if order == "by importance":
        g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    less = 1 if stored_as == "gptq" else 0
    tensors = {
        "qweight": pack(numbers.T, bits).T.contiguous(), "qzeros": pack(zeros - less, bits), "scales": scales,
        "g_idx": g_idx.int(),
    }  # fmt: skip
    raw = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": stored_as}
    got = read_linear(tensors, QuantizationConfig.read(raw, "config.json"), "file")
    expected = (numbers - zeros[g_idx]) * scales.float()[g_idx]
    assert torch.equal(weight_of(got, bits), expected.T) and (got.order is None) == (order == "in order")


def test_awq():
    numbers, scales, zeros = drawn(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # of outputs in a word
    tensors = {"qweight": pack(numbers, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}
    config = QuantizationConfig.read({"quant_method": "awq", "bits": 4, "group_size": GROUP}, "config.json")
    group = torch.arange(K) // GROUP
    expected = (numbers - zeros[group]) * scales.float()[group]
    assert torch.equal(weight_of(read_linear(tensors, config, "file"), 4), expected.T)


def test_flaws_are_named():
    numbers, scales, zeros = drawn(4)
    tensors = {"qweight": pack(numbers.T, 4).T.contiguous(), "qzeros": pack(zeros, 4), "scales": scales}
    config = QuantizationConfig("gptq", 4, GROUP)
    read_linear(tensors, config, "file")
    for name in tensors:
        with pytest.raises(CheckpointError, match=f"file: {name}: expected"):
            read_linear({n: t for n, t in tensors.items() if n != name}, config, "file")
        with pytest.raises(CheckpointError, match=r"file: \w+: expected"):
            read_linear(tensors | {name: tensors[name][:-1]}, config, "file")
    with pytest.raises(CheckpointError, match="file: g_idx: expected 16 inputs in each of 2 groups"):
        read_linear(tensors | {"g_idx": torch.zeros(K).int()}, config, "file")
    with pytest.raises(CheckpointError, match="file: scales: expected 4 groups of 8 inputs, got 2"):
        read_linear(tensors, QuantizationConfig("gptq", 4, 8), "file")
    for flaw in ({"quant_method": "other"}, {"bits": 3}, {"group_size": 0}, {"checkpoint_format": "marlin"}):
        raw = {"quant_method": "gptq", "bits": 4, "group_size": 128} | flaw
        with pytest.raises(CheckpointError, match=r"config.json: quantization_config: expected"):
            QuantizationConfig.read(raw, "config.json")
