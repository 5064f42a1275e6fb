"""Seeded tensors, index tensors, bitwise comparison."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = ("normal", "spikes", "large", "tiny", "subnormal", "zeros")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed values, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(*shape: int, dtype: torch.dtype, seed: int, kind: str = "normal") -> Tensor:
    """Finite values of one of KINDS: spikes are rare large values among normal ones; tiny values have products that
    leave the dtype's normal range; subnormal ones lie outside it themselves; zeros have both signs."""
    x, half = normal(*shape, seed=seed, dtype=torch.float64), dtype == torch.float16
    if kind == "spikes":
        rare = normal(*shape, seed=seed + 1) > 2
        x = torch.where(rare, 16 * x, x)
    elif kind == "large":
        x = 32 * x
    elif kind == "tiny":
        x = x * (2.0**-14 if half else 2.0**-70)
    elif kind == "subnormal":
        x = x * (2.0**-20 if half else 2.0**-130)
    elif kind == "zeros":
        x = x * 0
    return x.to(dtype)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def bits(x: Tensor) -> Tensor:
    """The tensor's bit patterns: equality that tells zeros apart and knows NaN."""
    return x.contiguous().view(BITS[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
