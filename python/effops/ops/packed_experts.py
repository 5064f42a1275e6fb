"""Weights of experts in the formats that :func:`effops.ops.fused_experts` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from effops.ops.packed_weight import BITS, FLOATS, PACKED_DTYPES, PackedWeight, groups_of, pack_weight

_PANEL = 32  # output features side by side, of a gate and its up values sixteen each


@dataclass(frozen=True)
class PackedExperts:
    """One weight of all experts: f outputs of d inputs each."""

    format: str
    data: Tensor  # [E, f, d], or panels of the CPU's kernels; of few bits [E, rows, row bytes], see _in_few_bits
    scale: Tensor | None = None  # float32 [E, f]: the step of each output's int8 numbers
    panels_of: tuple[int, int, int] | None = None  # [E, f, d] where data is in panels
    gated: bool = False  # panels hold gates and up values side by side

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.panels_of or (self.data.shape[0], self.data.shape[1], self.data.shape[2])

    @classmethod
    def of_data(
        cls, data: Tensor, scale: Tensor | None, shape: tuple[int, int, int], gated: bool
    ) -> PackedExperts | None:
        """Quantised panels of a weight of this shape; None where they cannot be that."""
        experts, features, inputs = shape
        runs = 2 if gated else 1
        tiles = -(-features // runs // (_PANEL // runs)) if features else 0
        if scale is not None:
            steps = (experts, tiles, -(-inputs // 2), 2 * _PANEL)
            right = data.dtype == torch.int8 and data.shape == steps and scale.shape == (experts, features)
            return cls("int8", data, scale, shape, gated) if right and scale.dtype == torch.float32 else None
        format = next((name for name, dtype in PACKED_DTYPES.items() if dtype == data.dtype), None)
        if format is None or data.dim() != 3 or data.shape[:2] != (experts, tiles * _PANEL):
            return None
        return None if groups_of(inputs, data.shape[2], BITS[format]) < 0 else cls(format, data, None, shape, gated)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def in_few_bits(self) -> bool:
        """Are they numbers in groups, as those of a :class:`PackedWeight`?"""
        return self.panels_of is not None and self.data.dim() == 3

    def _all_rows(self) -> PackedWeight:
        """What the rows of tiles of all experts are, one after the other."""
        assert self.panels_of is not None
        count = self.data.shape[0] * self.data.shape[1]
        return PackedWeight(self.format, self.data.flatten(0, 1), (count, self.panels_of[2]))

    def dequantize(self) -> Tensor:
        """The weight ``[E, f, d]`` as the product sees it; float32 where it is quantised."""
        if self.in_few_bits:
            return self._features(self._all_rows().dequantize())
        w = self.data if self.panels_of is None else _rows(self.data, self.panels_of, self.gated)
        return w if self.scale is None else w.float() * self.scale[..., None]

    def sizes(self) -> tuple[Tensor, int]:
        """Of numbers in groups: ``|scale| (|number| + |zero|)`` as they are stored, ``[E, f, d]``, and the groups."""
        numbers, scales, zeros = self._all_rows().numbers()
        stored = 128 if self.format == "int8" else 0
        groups = scales.shape[1]
        each = (numbers + stored).abs().unflatten(1, (groups, -1)) + (zeros + stored).abs()[..., None]
        return self._features((scales.abs()[..., None] * each).flatten(1)), groups

    def _features(self, rows: Tensor) -> Tensor:
        assert self.panels_of is not None
        experts, features, inputs = self.panels_of
        return _from_columns(rows.view(experts, -1, _PANEL, inputs), features, self.gated)


def pack_experts(
    w: Tensor,
    format: str = "int8",
    *,
    panels: bool = False,
    gated: bool = False,
    group_size: int | None = None,
    symmetric: bool = True,
) -> PackedExperts:
    """Prepares the weight ``[E, f, d]`` of experts. One that is in the format already is held, not copied.

    ``"int8"`` is symmetric by output feature: a step of ``max|row| / 127``, numbers rounded half to even. ``"int4"``
    and ``"fp8_e4m3"``, and ``"int8"`` with a group size or not symmetric, are numbers in groups of inputs as
    :func:`pack_weight` makes them, always in panels.

    Args:
        format: ``"int8"``, ``"int4"``, ``"fp8_e4m3"``, ``"f32"``, ``"bf16"`` or ``"f16"``.
        group_size, symmetric: as in :func:`pack_weight`.
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
    if format not in (*BITS, *FLOATS):
        raise ValueError(f"pack_experts: format: expected one of {', '.join((*BITS, *FLOATS))}, got {format}")
    grouped = group_size is not None or not symmetric
    if format in FLOATS and grouped:
        raise ValueError(f"pack_experts: group_size: expected none beside {format}, got {group_size}")
    few_bits = format in BITS and (format != "int8" or grouped)
    if gated and not ((panels or few_bits) and w.shape[1] % 2 == 0):
        raise ValueError(f"pack_experts: gated: expected False but for panels of an even f, got True for {w.shape[1]}")
    if few_bits:
        return _in_few_bits(w.detach(), format, gated, group_size, symmetric)
    data, scale = (w.detach().to(FLOATS[format]), None) if format in FLOATS else _quantize(w.detach().float())
    if not panels:
        return PackedExperts(format, data, scale)
    shape = (w.shape[0], w.shape[1], w.shape[2])
    return PackedExperts(format, _panels(data, gated), scale, shape, gated)


def pack_expert_layer(
    w_gate_up: Tensor,
    w_down: Tensor,
    format: str | None = None,
    *,
    interleaved: bool = False,
    group_size: int | None = None,
    symmetric: bool = True,
) -> tuple[PackedExperts, PackedExperts]:
    """Both weights of a layer in panels, as :func:`fused_experts` takes them.

    Args:
        w_gate_up: ``[E, 2f, d]``, or ``[E, f, d]`` without a gate; w_down: ``[E, d, f]``.
        format, group_size, symmetric: as in :func:`pack_experts`; None keeps the dtype.
        interleaved: each gate row comes before its up row; in the panels they no longer do, so that
            :func:`fused_experts` is called without it, and with biases in halves.
    """
    if format is None:
        own = [name for name, dtype in FLOATS.items() if dtype == w_down.dtype]
        if not own:
            raise ValueError(f"pack_expert_layer: w_down: expected float32, bfloat16 or float16, got {w_down.dtype}")
        format = own[0]
    gated = w_gate_up.shape[1] != w_down.shape[2]
    if interleaved:
        w_gate_up = torch.cat([w_gate_up[:, ::2], w_gate_up[:, 1::2]], 1)
    groups: Any = {"group_size": group_size, "symmetric": symmetric}
    return (
        pack_experts(w_gate_up, format, panels=True, gated=gated, **groups),
        pack_experts(w_down, format, panels=True, **groups),
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
    columns = _columns(w, gated)
    if not _in_pairs(w.dtype):
        return columns.transpose(2, 3).contiguous()
    pairs = pad(columns, (0, w.shape[2] % 2)).unflatten(3, (-1, 2))
    return pairs.transpose(2, 3).flatten(3).contiguous()


def _rows(panels: Tensor, shape: tuple[int, int, int], gated: bool) -> Tensor:
    """The [E, f, d] that _panels was given."""
    columns = panels.transpose(2, 3)
    if _in_pairs(panels.dtype):
        columns = panels.unflatten(3, (_PANEL, 2)).transpose(2, 3).flatten(3)[..., : shape[2]]
    return _from_columns(columns, shape[1], gated)


def _columns(w: Tensor, gated: bool) -> Tensor:
    """[E, f, d] as the columns of tiles [E, tiles, 32, d]: 32 features, or of gates and up values sixteen each."""
    runs = w.chunk(2, 1) if gated else (w,)
    width = _PANEL // len(runs)
    padded = [pad(run, (0, 0, 0, -run.shape[1] % width)).unflatten(1, (-1, width)) for run in runs]
    return torch.cat(padded, 2)


def _from_columns(columns: Tensor, features: int, gated: bool) -> Tensor:
    runs = columns.chunk(2, 2) if gated else (columns,)
    return torch.cat([run.flatten(1, 2)[:, : features // len(runs)] for run in runs], 1)


def _in_few_bits(w: Tensor, format: str, gated: bool, group_size: int | None, symmetric: bool) -> PackedExperts:
    """Tiles are panels of a PackedWeight, all experts' one after the other."""
    columns = _columns(w, gated).flatten(1, 2)
    try:
        packed = pack_weight(columns.flatten(0, 1), format, group_size=group_size, symmetric=symmetric)
    except ValueError as error:
        raise ValueError(str(error).replace("pack_weight", "pack_experts", 1)) from None
    shape = (w.shape[0], w.shape[1], w.shape[2])
    return PackedExperts(format, packed.data.unflatten(0, columns.shape[:2]), None, shape, gated)
