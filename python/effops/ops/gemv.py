"""Linear layers for few rows, at the speed of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches
from effops.ops._invariance import is_batch_invariant
from effops.ops.layer import rms_norm, silu_mul
from effops.ops.packed_weight import PackedWeight

_packed_linear = torch.ops.effops.packed_linear.default


def packed_linear(
    x: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
    activation: str | None = None,
) -> Tensor:
    """``f(x) W^T + bias + residual``, the sum rounded once on the streaming path.

    f is nothing, the RMS norm before the layer or the gated activation: with the same bits as :func:`rms_norm` and
    :func:`silu_mul` before the call, without their calls. Up to 16 rows stream the weights once at read bandwidth; more
    rows take torch's own GEMM (float16: the streaming loop again, since torch has no fast float16 GEMM on CPUs).
    ``effops.explain("packed_linear", ...)`` names the path. Under ``effops.batch_invariant(True)`` all rows stream, by
    one loop: plain weights must then be on the CPU.

    Args:
        x: ``[..., K]`` (``[..., 2K]`` if gated), float32, bfloat16, float16 or float64.
        weight: ``[N, K]``, packed or plain, x's dtype; any strides, rows contiguous for speed. Or quantised, a
            PackedWeight or its ``data``: x is then float32, bfloat16 or float16, products are summed in float32 by
            groups, and any number of rows streams.
        bias: ``[N]``; residual: ``[..., N]``, added in the epilogue; x's dtype.
        norm: ``[K]``, x's dtype: ``rms_norm(x, norm, norm_eps)`` comes first.
        gated: ``silu_mul(x)`` comes first; excludes norm.
        activation: ``"int8"`` beside int8 and int4 weights on the CPU: each group of inputs of a row becomes int8,
            steps of its largest size / 127 rounded half to even, and numbers multiply as integers. Faster for several
            rows and where memory is fast, with about 0.5 % of noise in the result. None: as it is.

    Returns:
        ``[..., N]``, contiguous, x's dtype. No gradient: raises where one is asked for.
    """
    if isinstance(weight, PackedWeight) and weight.quantized_shape is not None:
        expected = weight.shape[1] * (2 if gated else 1)
        if x.dim() and x.shape[-1] != expected:
            raise RuntimeError(f"packed_linear: x: expected shape [..., {expected}], got {list(x.shape)}")
    if isinstance(weight, PackedWeight) and weight.order is not None:
        x = (rms_norm(x, norm, norm_eps) if norm is not None else silu_mul(x) if gated else x)[..., weight.order]
        norm, gated = None, False
    if activation not in (None, "int8"):
        raise ValueError(f"packed_linear: activation: expected None or int8, got {activation!r}")
    options: dict[str, Any] = {}  # what is off stays out: an argument costs 0.2 µs
    if residual is not None:
        options["residual"] = residual
    if norm is not None:
        options["norm"], options["norm_eps"] = norm, norm_eps
    if gated:
        options["gated"] = True
    if activation is not None:
        options["int8_activation"] = True
    if is_batch_invariant():
        options["batch_invariant"] = True
    w = weight.data if isinstance(weight, PackedWeight) else weight
    if dispatches(x, w, bias, residual, norm):
        out: Tensor = _packed_linear(x, w, bias, **options)
        return out
    with BelowAutograd():
        out = _packed_linear(x, w, bias, **options)
        return out
