"""Linear layers for few rows, at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_packed_linear = torch.ops.effops.packed_linear.default
_FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class PackedWeight:
    """The weight of a linear layer in the format that :func:`packed_linear` reads."""

    format: str
    data: Tensor  # [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    def dequantize(self) -> Tensor:
        """The weight ``[N, K]`` as the product sees it."""
        return self.data


def pack_weight(w: Tensor, format: str | None = None) -> PackedWeight:
    """Prepares a weight ``[N, K]``. A weight that is in the format already is held, not copied.

    Args:
        format: ``"f32"``, ``"bf16"`` or ``"f16"``; None: that of w's dtype.

    Raises:
        ValueError: unknown format, or w is not a matrix of a floating dtype.
    """
    if w.dim() != 2:
        raise ValueError(f"pack_weight: w: expected shape [N, K], got {list(w.shape)}")
    if format is None:
        format = next((name for name, dtype in _FORMATS.items() if dtype == w.dtype), str(w.dtype))
    if format not in _FORMATS:
        raise ValueError(f"pack_weight: format: expected one of {', '.join(_FORMATS)}, got {format}")
    if not w.is_floating_point():
        raise ValueError(f"pack_weight: w: expected a floating dtype, got {w.dtype}")
    return PackedWeight(format, w.detach().to(_FORMATS[format]))


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
        weight: ``[N, K]``, packed or plain, x's dtype; any strides, rows contiguous for speed.
        bias: ``[N]``; residual: ``[..., N]``, added in the epilogue; x's dtype.
        norm: ``[K]``, x's dtype: ``rms_norm(x, norm, norm_eps)`` comes first.
        gated: ``silu_mul(x)`` comes first; excludes norm.

    Returns:
        ``[..., N]``, contiguous, x's dtype. No gradient: raises where one is asked for.
    """
    w = weight.data if isinstance(weight, PackedWeight) else weight
    options: dict[str, Any] = {}  # what is off stays out: an argument costs 0.2 µs
    if residual is not None:
        options["residual"] = residual
    if norm is not None:
        options["norm"], options["norm_eps"] = norm, norm_eps
    if gated:
        options["gated"] = True
    if dispatches(x, w, bias, residual, norm):
        return _packed_linear(x, w, bias, **options)
    with BelowAutograd():
        return _packed_linear(x, w, bias, **options)
