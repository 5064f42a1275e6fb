"""Steps of a decoder layer: RMS norm, rotary embedding, gated activation."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, tracks_grad

_rms_norm = torch.ops.effops.rms_norm.default
_rotary = torch.ops.effops.rotary.default
_silu_mul = torch.ops.effops.silu_mul.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last dimension (arXiv 1910.07467).

    Args:
        x: ``[..., D]``, float32, bfloat16, float16 or float64; weight: ``[D]``, x's dtype.
        weight_offset: 1 for Gemma's parametrisation.

    Computed in float32 and rounded once. No gradient: raises where one is asked for.
    """
    if tracks_grad(x, weight):
        return _rms_norm(x, weight, eps, weight_offset=weight_offset)
    with BelowAutograd():
        return _rms_norm(x, weight, eps, weight_offset=weight_offset)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) on half-split pairs ``(i, i + R/2)`` of the first R dimensions.

    Args:
        x: ``[B, T, H, D]``; cos, sin: float32 ``[P, R/2]``; positions: int32 ``[B, T]``, in ``[0, P)``.

    Returns:
        ``[B, T, H, D]``, contiguous; dimensions from R on pass through. No gradient.
    """
    if tracks_grad(x, cos, sin):
        return _rotary(x, cos, sin, positions)
    with BelowAutograd():
        return _rotary(x, cos, sin, positions)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's activation (arXiv 2002.05202): ``silu(x[..., :f]) * x[..., f:]`` for x ``[..., 2f]``. No gradient."""
    if tracks_grad(x):
        return _silu_mul(x)
    with BelowAutograd():
        return _silu_mul(x)
