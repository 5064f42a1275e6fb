"""Linear layers for few rows, at the speed of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches
from effops.ops.layer import rms_norm, silu_mul
from effops.ops.packed_weight import PackedWeight

_packed_linear = torch.ops.effops.packed_linear.default
_quantized_linear = torch.ops.effops.quantized_linear.default


def packed_linear(
    x: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
) -> Tensor:
    """``f(x) W^T + bias + residual``, the sum rounded once on the streaming path.

    f is nothing, the RMS norm before the layer or the gated activation: with the same bits as :func:`rms_norm` and
    :func:`silu_mul` before the call, without their calls. Up to 16 rows stream the weights once at read bandwidth; more
    rows take torch's own GEMM (float16: the streaming loop again, since torch has no fast float16 GEMM on CPUs).
    ``effops.explain("packed_linear", ...)`` names the path.

    Args:
        x: ``[..., K]`` (``[..., 2K]`` if gated), float32, bfloat16, float16 or float64.
        weight: ``[N, K]``, packed or plain, x's dtype; any strides, rows contiguous for speed. Or quantised: x is then
            float32, bfloat16 or float16, products are summed in float32 by groups, and any number of rows streams.
        bias: ``[N]``; residual: ``[..., N]``, added in the epilogue; x's dtype.
        norm: ``[K]``, x's dtype: ``rms_norm(x, norm, norm_eps)`` comes first.
        gated: ``silu_mul(x)`` comes first; excludes norm.

    Returns:
        ``[..., N]``, contiguous, x's dtype. No gradient: raises where one is asked for.
    """
    if isinstance(weight, PackedWeight) and weight.order is not None:
        x = (rms_norm(x, norm, norm_eps) if norm is not None else silu_mul(x) if gated else x)[..., weight.order]
        norm, gated = None, False
    options: dict[str, Any] = {}  # what is off stays out: an argument costs 0.2 µs
    if residual is not None:
        options["residual"] = residual
    if norm is not None:
        options["norm"], options["norm_eps"] = norm, norm_eps
    if gated:
        options["gated"] = True
    op: Any = _packed_linear
    arguments: tuple[Any, ...] = (x, weight, bias)
    if isinstance(weight, PackedWeight):
        arguments = (x, weight.data, bias)
        if weight.scales is not None:
            op = _quantized_linear
            arguments = (x, weight.data, weight.scales, weight.zeros, weight.shape[0], weight.bits, bias)
    if dispatches(x, arguments[1], bias, residual, norm):
        out: Tensor = op(*arguments, **options)
        return out
    with BelowAutograd():
        out = op(*arguments, **options)
        return out
