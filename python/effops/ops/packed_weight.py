"""Weights of linear layers in the formats that :func:`effops.ops.packed_linear` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITS = {"int8": 8, "int4": 4}
_PANEL, _WORD = 32, 8  # output features side by side; int4 inputs of a 32-bit word, what inputs are padded to


@dataclass(frozen=True)
class PackedWeight:
    """The weight [N, K] of a linear layer. In a floating format ``data`` is the weight; quantised, it is what the
    kernels read, and a weight is ``(number - zero) * scale`` of its group of inputs."""

    format: str
    data: Tensor  # [N, K]; int8 [panels, K, 32]; or int4, int32 words [panels, K / 8, 32]: K padded to words by group
    scales: Tensor | None = None  # float32 [panels, groups, 32]
    zeros: Tensor | None = None  # the same; None: 8 for int4, 0 for int8
    quantized_shape: tuple[int, int] | None = None
    order: Tensor | None = None  # int64 [K]: the input that each place of a quantised weight has; None: in order

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantized_shape or (self.data.shape[0], self.data.shape[1])

    @property
    def bits(self) -> int:
        """Of a weight."""
        return BITS.get(self.format, 8 * self.data.element_size())

    @property
    def group_size(self) -> int | None:
        """Inputs that share a step; None in a floating format."""
        return None if self.scales is None else self.shape[1] // max(1, self.scales.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.zeros, self.order) if t is not None)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a quantised weight, in the order of its places: numbers int16 [N, K]; scales and zeros float32
        [N, groups]."""
        assert self.scales is not None
        n, k = self.shape
        groups = self.scales.shape[1]
        raw = _fields(self.data) if self.format == "int4" else self.data.to(torch.int16)
        rows = raw.transpose(1, 2).flatten(0, 1)[:n]
        numbers = rows.unflatten(1, (groups, -1))[..., : k // max(1, groups)].flatten(1) if k else rows
        scales = _from_panels(self.scales, n)
        middle = torch.full_like(scales, 8.0 if self.format == "int4" else 0.0)
        return numbers, scales, middle if self.zeros is None else _from_panels(self.zeros, n)

    def dequantize(self) -> Tensor:
        """The weight [N, K] as the product sees it; float32 where it is quantised."""
        if self.scales is None:
            return self.data
        numbers, scales, zeros = self.numbers()
        if self.shape[1] == 0:
            return torch.zeros(self.shape)
        in_groups = numbers.float().unflatten(1, (scales.shape[1], -1))
        return self.in_order(((in_groups - zeros[..., None]) * scales[..., None]).flatten(1))

    def in_order(self, places: Tensor) -> Tensor:
        """What places [N, K] hold, by inputs."""
        return places if self.order is None else torch.empty_like(places).index_copy_(1, self.order, places)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a safetensors file holds of it: see :meth:`from_tensors`."""
        n, k = self.shape
        about = torch.tensor([n, k, BITS.get(self.format, 0)])
        named = {"data": self.data, "scales": self.scales, "zeros": self.zeros, "order": self.order, "about": about}
        return {f"{prefix}{name}": t.contiguous() for name, t in named.items() if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> PackedWeight:
        """Back from :meth:`tensors`, bit for bit.

        Raises:
            ValueError: a tensor is missing, or one has not the shape or dtype that the others say.
        """
        for name in ("data", "about"):
            if prefix + name not in tensors:
                raise ValueError(f"PackedWeight: {prefix}{name}: expected a tensor of this name, got {sorted(tensors)}")
        data, scales, zeros, order, about = (
            tensors.get(prefix + name) for name in ("data", "scales", "zeros", "order", "about")
        )
        assert data is not None and about is not None
        if about.dtype != torch.int64 or about.shape != (3,):
            raise ValueError(f"PackedWeight: {prefix}about: expected int64 [3], got {about.dtype} {list(about.shape)}")
        n, k, bits = about.tolist()
        if bits == 0:
            formats = [name for name, dtype in FLOATS.items() if dtype == data.dtype]
            if not formats or data.shape != (n, k):
                raise ValueError(
                    f"PackedWeight: {prefix}data: expected a floating [{n}, {k}], got {data.dtype} {list(data.shape)}"
                )
            return cls(formats[0], data)
        format = next((name for name, b in BITS.items() if b == bits), None)
        if format is None:
            raise ValueError(f"PackedWeight: {prefix}about: expected 0, 4 or 8 bits, got {bits}")
        if scales is None:
            raise ValueError(f"PackedWeight: {prefix}scales: expected a tensor beside {bits} bits, got None")
        panels = -(-n // _PANEL)
        groups = scales.shape[1] if scales.dim() == 3 else -1
        _expect(f"{prefix}scales", scales, torch.float32, (panels, groups, _PANEL))
        if not (groups == 0 if k == 0 else groups > 0 and k % groups == 0):
            raise ValueError(f"PackedWeight: {prefix}scales: expected groups that divide K = {k}, got {groups}")
        padded = groups * -(-(k // max(1, groups)) // _WORD) * _WORD
        if bits == 4:
            _expect(f"{prefix}data", data, torch.int32, (panels, padded // _WORD, _PANEL))
        else:
            _expect(f"{prefix}data", data, torch.int8, (panels, padded, _PANEL))
        if zeros is not None:
            _expect(f"{prefix}zeros", zeros, torch.float32, (panels, groups, _PANEL))
        if order is not None:
            _expect(f"{prefix}order", order, torch.int64, (k,))
            if not torch.equal(order.sort().values, torch.arange(k, device=order.device)):
                raise ValueError(f"PackedWeight: {prefix}order: expected each of {k} inputs once, got others")
        return cls(format, data, scales, zeros, (n, k), order)


def _expect(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or t.shape != shape:
        raise ValueError(f"PackedWeight: {name}: expected {dtype} {list(shape)}, got {t.dtype} {list(t.shape)}")


def pack_weight(
    w: Tensor, format: str | None = None, *, group_size: int | None = None, symmetric: bool = True
) -> PackedWeight:
    """Prepares a weight ``[N, K]``. A weight that is in a floating format already is held, not copied.

    ``"int8"`` and ``"int4"`` store numbers of that many bits, rounded half to even, and for each group of inputs of an
    output feature a step: ``max|w| / 127`` or ``/ 7`` where symmetric, else the range of the group and zero in 255 or
    15 steps, with a zero that is a number. So every weight is within half a step.

    Args:
        format: ``"f32"``, ``"bf16"``, ``"f16"``, ``"int8"`` or ``"int4"``; None: that of w's dtype.
        group_size: inputs that share a step: a multiple of 8 that divides K; None: 128 for int4 where it divides K,
            else all.
        symmetric: whether numbers are as far below zero as above.

    Raises:
        ValueError: unknown format, w is not a matrix of a floating dtype or, to be quantised, not finite; a group size
            that K is no multiple of.
    """
    if w.dim() != 2:
        raise ValueError(f"pack_weight: w: expected shape [N, K], got {list(w.shape)}")
    if format is None:
        format = next((name for name, dtype in FLOATS.items() if dtype == w.dtype), str(w.dtype))
    if format not in FLOATS and format not in BITS:
        raise ValueError(f"pack_weight: format: expected one of {', '.join([*FLOATS, *BITS])}, got {format}")
    if not w.is_floating_point():
        raise ValueError(f"pack_weight: w: expected a floating dtype, got {w.dtype}")
    if format in FLOATS:
        if group_size is not None:
            raise ValueError(f"pack_weight: group_size: expected None beside {format}, got {group_size}")
        return PackedWeight(format, w.detach().to(FLOATS[format]))
    w = w.detach().float()
    if not w.isfinite().all():
        raise ValueError(f"pack_weight: w: expected finite values for {format}, got NaN or inf")
    inputs = w.shape[1]
    if group_size is None:
        group_size = 128 if format == "int4" and inputs % 128 == 0 and inputs > 0 else inputs
    if inputs and (group_size < 1 or inputs % group_size or (group_size % _WORD and group_size != inputs)):
        raise ValueError(
            f"pack_weight: group_size: expected a multiple of {_WORD} that divides K = {inputs}, or K, got {group_size}"
        )
    groups = inputs // group_size if inputs else 0
    in_groups = w.unflatten(1, (groups, group_size)) if groups else w.new_zeros(w.shape[0], 0, 1)
    numbers, scales, zeros = _quantize(in_groups, BITS[format], symmetric)
    return from_numbers(numbers, scales, zeros, format)


def from_numbers(
    numbers: Tensor, scales: Tensor, zeros: Tensor | None, format: str, order: Tensor | None = None
) -> PackedWeight:
    """Of numbers [N, groups, group], scales and zeros [N, groups], as they come from a quantiser or a checkpoint:
    0 to 15 for int4, -128 to 127 for int8."""
    shape = (numbers.shape[0], numbers.shape[1] * numbers.shape[2])
    rows = pad(numbers, (0, -numbers.shape[2] % _WORD)).flatten(1)
    panels = pad(rows, (0, 0, 0, -shape[0] % _PANEL)).unflatten(0, (-1, _PANEL)).transpose(1, 2)  # [panels, K, 32]
    data = panels.to(torch.int8).contiguous() if format == "int8" else _words(panels)
    in_panels = [None if t is None else _to_panels(t.float()) for t in (scales, zeros)]
    return PackedWeight(format, data, in_panels[0], in_panels[1], shape, order)


def _quantize(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers, scales and zeros of w [N, groups, group]."""
    least, most = (0, 15) if bits == 4 else (-128, 127)
    if symmetric:
        middle, largest = (8, 7) if bits == 4 else (0, 127)
        scales = (w.abs().amax(-1) if w.numel() else w.new_zeros(w.shape[:-1])) / largest
        steps = w / torch.where(scales > 0, scales, 1.0)[..., None]
        return (steps.round() + middle).clamp(middle - largest, middle + largest), scales, None
    low = (w.amin(-1) if w.numel() else w.new_zeros(w.shape[:-1])).clamp(max=0)
    high = (w.amax(-1) if w.numel() else w.new_zeros(w.shape[:-1])).clamp(min=0)
    scales = (high - low) / (most - least)
    divisor = torch.where(scales > 0, scales, 1.0)
    zeros = least - (low / divisor).round()
    numbers = ((w / divisor[..., None]).round() + zeros[..., None]).clamp(least, most)
    return numbers, scales, zeros


def _words(panels: Tensor) -> Tensor:
    """Numbers [panels, K, 32] of 0 to 15 as words [panels, K / 8, 32]."""
    fields = panels.to(torch.int64).unflatten(1, (-1, _WORD))
    shifts = torch.arange(0, 32, 4).view(1, 1, _WORD, 1)
    words = (fields << shifts).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _fields(words: Tensor) -> Tensor:
    """The inverse of _words, int16."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(1, 1, _WORD, 1)
    return ((words[:, :, None] >> shifts) & 15).to(torch.int16).flatten(1, 2)


def _to_panels(t: Tensor) -> Tensor:
    """[N, groups] as [panels, groups, 32]."""
    return pad(t, (0, 0, 0, -t.shape[0] % _PANEL)).unflatten(0, (-1, _PANEL)).transpose(1, 2).contiguous()


def _from_panels(t: Tensor, features: int) -> Tensor:
    return t.transpose(1, 2).flatten(0, 1)[:features]
