"""Steps of a decoder layer: RMS norm, rotary embedding (with cache writes), gated activation."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, BelowAutograd, dispatches, increment_version, tracks_grad

_rms_norm = torch.ops.effops.rms_norm.default
_rotary = torch.ops.effops.rotary.default
_rotary_append = torch.ops.effops.rotary_append.default
_silu_mul = torch.ops.effops.silu_mul.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last dimension (arXiv 1910.07467).

    Args:
        x: ``[..., D]``, float32, bfloat16, float16 or float64; weight: ``[D]``, x's dtype.
        weight_offset: 1 for Gemma's parametrisation.

    Computed in float32 and rounded once. No gradient: raises where one is asked for.
    """
    offset = {"weight_offset": weight_offset} if weight_offset else {}
    if dispatches(x, weight):
        return _rms_norm(x, weight, eps, **offset)
    with BelowAutograd():
        return _rms_norm(x, weight, eps, **offset)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) on half-split pairs ``(i, i + R/2)`` of the first R dimensions.

    Args:
        x: ``[B, T, H, D]``; cos, sin: float32 ``[P, R/2]``; positions: int32 ``[B, T]``, in ``[0, P)``.

    Returns:
        ``[B, T, H, D]``, contiguous; dimensions from R on pass through. No gradient.
    """
    if dispatches(x, cos, sin):
        return _rotary(x, cos, sin, positions)
    with BelowAutograd():
        return _rotary(x, cos, sin, positions)


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    page_table: Tensor | None = None,
) -> Tensor:
    """:func:`rotary` of the query and key heads of a fused projection and :func:`append_kv` of its keys and values.

    Args:
        qkv: ``[B, T, H + 2G, D]``: query heads, key heads, value heads, as a fused projection gives them.
        cos, sin, positions: as in :func:`rotary`.
        k_cache, v_cache: ``[B, L, G, D]``, any strides, written in place; slots: int32 ``[B, T]``; page_table, as in
            :func:`append_kv`. Every position and slot is checked before anything is written.

    Returns:
        The turned queries ``[B, T, H, D]``, contiguous. The same bits as the two ops. No gradient.
    """
    options = {} if page_table is None else {"page_table": page_table}
    if tracks_grad(qkv, cos, sin, k_cache, v_cache):
        return _rotary_append(qkv, cos, sin, positions, k_cache, v_cache, slots, **options)
    with BelowADInplaceOrView():
        q = _rotary_append(qkv, cos, sin, positions, k_cache, v_cache, slots, **options)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache))
    return q


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's activation (arXiv 2002.05202): ``silu(x[..., :f]) * x[..., f:]`` for x ``[..., 2f]``. No gradient."""
    if dispatches(x):
        return _silu_mul(x)
    with BelowAutograd():
        return _silu_mul(x)
