"""Weights of experts in the formats that :func:`effops.ops.fused_experts` reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_PANEL = 32  # output features side by side, of a gate and its up values sixteen each


@dataclass(frozen=True)
class PackedExperts:
    """One weight of all experts: f outputs of d inputs each."""

    format: str
    data: Tensor  # [E, f, d], or panels of the CPU's kernels
    scale: Tensor | None = None  # float32 [E, f]: the step of each output's int8 numbers
    panels_of: tuple[int, int, int] | None = None  # [E, f, d] where data is in panels
    gated: bool = False  # panels hold gates and up values side by side

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.panels_of or (self.data.shape[0], self.data.shape[1], self.data.shape[2])

    def dequantize(self) -> Tensor:
        """The weight ``[E, f, d]`` as the product sees it; float32 for int8."""
        w = self.data if self.panels_of is None else _rows(self.data, self.panels_of, self.gated)
        return w if self.scale is None else w.float() * self.scale[..., None]


def pack_experts(w: Tensor, format: str = "int8", *, panels: bool = False, gated: bool = False) -> PackedExperts:
    """Prepares the weight ``[E, f, d]`` of experts. One that is in the format already is held, not copied.

    ``"int8"`` is symmetric by output feature: a step of ``max|row| / 127``, numbers rounded half to even.

    Args:
        format: ``"int8"``, ``"f32"``, ``"bf16"`` or ``"f16"``.
        panels: copies the weight into the order in which the CPU's kernels read it, for calls of few tokens. Both
            weights of a layer are in panels, or none; devices and gradients take plain ones.
        gated: with ``panels``, w holds gate rows before as many up rows.

    Raises:
        ValueError: unknown format, w is not ``[E, f, d]`` of a floating dtype, or not finite where int8 is asked for.
    """
    if w.dim() != 3:
        raise ValueError(f"pack_experts: w: expected shape [E, f, d], got {list(w.shape)}")
    if not w.is_floating_point():
        raise ValueError(f"pack_experts: w: expected a floating dtype, got {w.dtype}")
    if format not in ("int8", *_FORMATS):
        raise ValueError(f"pack_experts: format: expected one of int8, {', '.join(_FORMATS)}, got {format}")
    if gated and not (panels and w.shape[1] % 2 == 0):
        raise ValueError(f"pack_experts: gated: expected False but for panels of an even f, got True for {w.shape[1]}")
    data, scale = (w.detach().to(_FORMATS[format]), None) if format in _FORMATS else _quantize(w.detach().float())
    if not panels:
        return PackedExperts(format, data, scale)
    shape = (w.shape[0], w.shape[1], w.shape[2])
    return PackedExperts(format, _panels(data, gated), scale, shape, gated)


def pack_expert_layer(
    w_gate_up: Tensor, w_down: Tensor, format: str | None = None, *, interleaved: bool = False
) -> tuple[PackedExperts, PackedExperts]:
    """Both weights of a layer in panels, as :func:`fused_experts` takes them.

    Args:
        w_gate_up: ``[E, 2f, d]``, or ``[E, f, d]`` without a gate; w_down: ``[E, d, f]``.
        format: as in :func:`pack_experts`; None keeps the dtype.
        interleaved: each gate row comes before its up row; in the panels they no longer do, so that
            :func:`fused_experts` is called without it, and with biases in halves.
    """
    if format is None:
        own = [name for name, dtype in _FORMATS.items() if dtype == w_down.dtype]
        if not own:
            raise ValueError(f"pack_expert_layer: w_down: expected float32, bfloat16 or float16, got {w_down.dtype}")
        format = own[0]
    gated = w_gate_up.shape[1] != w_down.shape[2]
    if interleaved:
        w_gate_up = torch.cat([w_gate_up[:, ::2], w_gate_up[:, 1::2]], 1)
    return (
        pack_experts(w_gate_up, format, panels=True, gated=gated),
        pack_experts(w_down, format, panels=True),
    )


def _quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    if not w.isfinite().all():
        raise ValueError("pack_experts: w: expected finite values for int8, got NaN or inf")
    scale = (w.abs().amax(-1) if w.shape[-1] else w.new_zeros(w.shape[:-1])) / 127
    steps = w / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def _in_pairs(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.int8)


def _panels(w: Tensor, gated: bool) -> Tensor:
    """[E, panels, d, 32], of bfloat16 and int8 pairs of inputs [E, panels, d / 2, 64]."""
    runs = w.chunk(2, 1) if gated else (w,)
    width = _PANEL // len(runs)
    padded = [pad(run, (0, 0, 0, -run.shape[1] % width)).unflatten(1, (-1, width)) for run in runs]
    columns = torch.cat(padded, 2)  # [E, panels, 32, d]
    if not _in_pairs(w.dtype):
        return columns.transpose(2, 3).contiguous()
    pairs = pad(columns, (0, w.shape[2] % 2)).unflatten(3, (-1, 2))
    return pairs.transpose(2, 3).flatten(3).contiguous()


def _rows(panels: Tensor, shape: tuple[int, int, int], gated: bool) -> Tensor:
    """The [E, f, d] that _panels was given."""
    columns = panels.transpose(2, 3)
    if _in_pairs(panels.dtype):
        columns = panels.unflatten(3, (_PANEL, 2)).transpose(2, 3).flatten(3)[..., : shape[2]]
    runs = columns.chunk(2, 2) if gated else (columns,)
    features = shape[1] // len(runs)
    return torch.cat([run.flatten(1, 2)[:, :features] for run in runs], 1)
