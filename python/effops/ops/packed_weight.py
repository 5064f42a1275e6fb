"""Weights of linear layers in the formats that :func:`effops.ops.packed_linear` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITS = {"int8": 8, "int4": 4, "fp8_e4m3": 8}
PACKED_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn}
_RANGES = {"int8": (-128, 127), "int4": (0, 15)}
_LARGEST_FP8 = 448
_PANEL = 32  # output features side by side
_PADDED = 8  # what the inputs of a group are padded to


@dataclass(frozen=True)
class PackedWeight:
    """The weight [N, K] of a linear layer. In a floating format ``data`` is the weight; quantised, a weight is
    ``(number - zero) * scale`` of its group of inputs, and ``data`` what the kernels read."""

    format: str
    data: Tensor  # [N, K]; or [N, row bytes] of int8, uint8 (two int4 a byte) or float8_e4m3fn: see _rows
    quantized_shape: tuple[int, int] | None = None
    order: Tensor | None = None  # int64 [K]: the input that each place of a quantised weight has; None: in order

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantized_shape or (self.data.shape[0], self.data.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of :meth:`dequantize`."""
        return self.data.dtype if self.quantized_shape is None else torch.float32

    @property
    def device(self) -> torch.device:
        return self.data.device

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        """No function of torch takes one. Said so, torch's modules leave fast paths that hand their layers' weights to
        one, such as ``nn.TransformerEncoderLayer``'s."""
        return NotImplemented

    @property
    def bits(self) -> int:
        """Of a weight."""
        return BITS.get(self.format, 8 * self.data.element_size())

    @property
    def group_size(self) -> int | None:
        """Inputs that share a step; None in a floating format."""
        if self.quantized_shape is None:
            return None
        return self.shape[1] // max(1, groups_of(self.shape[1], self.data.shape[1], self.bits))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.order is None else self.order.nbytes)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a quantised weight, in the order of its places: numbers [N, K], scales and zeros [N, groups], float32."""
        n, k = self.shape
        groups = groups_of(k, self.data.shape[1], self.bits)
        if groups == 0:
            return torch.zeros(n, k), torch.zeros(n, 0), torch.zeros(n, 0)
        data = self.data if self.data.storage_offset() % 4 == 0 else self.data.clone()  # of words
        words = _rows(data.view(torch.int32), back=True).unflatten(1, (groups, -1))
        least = _RANGES.get(self.format, (0, 0))[0]
        fields = _fields(words[..., :-1].contiguous(), self.bits)[..., : k // groups].flatten(1)
        if self.format == "fp8_e4m3":
            numbers = fields.to(torch.uint8).view(torch.float8_e4m3fn).float()
        else:
            numbers = fields.float() + least
        steps = words[..., -1].contiguous()
        return numbers, (steps & ~255).view(torch.float32), (steps & 255).float() + least

    def dequantize(self) -> Tensor:
        """The weight [N, K] as the product sees it; float32 where it is quantised."""
        if self.quantized_shape is None:
            return self.data
        numbers, scales, zeros = self.numbers()
        if self.shape[1] == 0:
            return numbers
        in_groups = numbers.unflatten(1, (scales.shape[1], -1))
        return self.in_order(((in_groups - zeros[..., None]) * scales[..., None]).flatten(1))

    def in_order(self, places: Tensor) -> Tensor:
        """What places [N, K] hold, by inputs."""
        return places if self.order is None else torch.empty_like(places).index_copy_(1, self.order, places)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a safetensors file holds of it: see :meth:`from_tensors`."""
        named = {"data": self.data, "order": self.order, "about": torch.tensor([*self.shape, self.group_size or 0])}
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
        data, order, about = (tensors.get(prefix + name) for name in ("data", "order", "about"))
        assert data is not None and about is not None
        if about.dtype != torch.int64 or about.shape != (3,):
            raise ValueError(f"PackedWeight: {prefix}about: expected int64 [3], got {about.dtype} {list(about.shape)}")
        n, k, group = about.tolist()
        format = next((name for name, dtype in {**FLOATS, **PACKED_DTYPES}.items() if dtype == data.dtype), None)
        if format is None or data.dim() != 2 or data.shape[0] != n or (format in FLOATS and data.shape[1] != k):
            raise ValueError(
                f"PackedWeight: {prefix}data: expected [{n}, {k}] in a floating format or [{n}, row bytes], "
                f"got {data.dtype} {list(data.shape)}"
            )
        if format in FLOATS:
            return cls(format, data)
        groups = groups_of(k, data.shape[1], BITS[format])
        if groups < 0 or groups * group != k:
            raise ValueError(
                f"PackedWeight: {prefix}data: expected rows of {k} inputs in {format}, padded to {_PADDED}, and 4 "
                f"bytes for each group of {group} inputs, got {data.shape[1]} bytes"
            )
        if order is not None:
            if order.dtype != torch.int64 or order.shape != (k,):
                raise ValueError(
                    f"PackedWeight: {prefix}order: expected int64 [{k}], got {order.dtype} {list(order.shape)}"
                )
            if not torch.equal(order.sort().values, torch.arange(k, device=order.device)):
                raise ValueError(f"PackedWeight: {prefix}order: expected each of {k} inputs once, got others")
        return cls(format, data, (n, k), order)


def pack_weight(
    w: Tensor, format: str | None = None, *, group_size: int | None = None, symmetric: bool = True
) -> PackedWeight:
    """Prepares a weight ``[N, K]``. A weight that is in a floating format already is held, not copied.

    ``"int8"`` and ``"int4"`` store numbers of that many bits, rounded half to even, and for each group of inputs of an
    output feature a step: ``max|w| / 127`` or ``/ 7`` where symmetric, else the range of the group and zero in 255 or
    15 steps, with a zero that is a number. So every weight is within half a step. ``"fp8_e4m3"`` stores float8 numbers
    of steps ``max|w| / 448``, rounded half to even. A step is a float32 of 16 bits, rounded up.

    Args:
        format: ``"f32"``, ``"bf16"``, ``"f16"``, ``"int8"``, ``"int4"`` or ``"fp8_e4m3"``; None: that of w's dtype.
        group_size: inputs that share a step: a multiple of 8 that divides K; None: 128 for int4 where it divides K,
            else all.
        symmetric: whether numbers are as far below zero as above.

    Raises:
        ValueError: unknown format, w is not a matrix of a floating dtype or, to be quantised, not finite; a group size
            that K is no multiple of; float8 with zeros.
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
    if format == "fp8_e4m3" and not symmetric:
        raise ValueError("pack_weight: symmetric: expected True beside fp8_e4m3, got False")
    w = w.detach().float()
    if not w.isfinite().all():
        raise ValueError(f"pack_weight: w: expected finite values for {format}, got NaN or inf")
    inputs = w.shape[1]
    if group_size is None:
        group_size = 128 if format == "int4" and inputs % 128 == 0 and inputs > 0 else inputs
    if inputs and (group_size < 1 or inputs % group_size or (group_size % _PADDED and group_size != inputs)):
        raise ValueError(
            f"pack_weight: group_size: expected a multiple of {_PADDED} that divides K = {inputs}, or K, "
            f"got {group_size}"
        )
    groups = inputs // group_size if inputs else 0
    in_groups = w.unflatten(1, (groups, group_size)) if groups else w.new_zeros(w.shape[0], 0, 1)
    return from_numbers(*_quantize(in_groups, format, symmetric), format)


def from_numbers(
    numbers: Tensor, scales: Tensor, zeros: Tensor | None, format: str, order: Tensor | None = None
) -> PackedWeight:
    """Of numbers [N, groups, group], scales and zeros [N, groups], as they come from a quantiser or a checkpoint:
    0 to 15 for int4, -128 to 127 for int8; zeros None: 8 and 0. Scales are rounded to 16 bits.

    Raises:
        ValueError: a zero that its byte does not hold.
    """
    n, groups, group = numbers.shape
    bits, least = BITS[format], _RANGES.get(format, (0, 0))[0]
    padded = pad(numbers, (0, -group % _PADDED))
    if format == "fp8_e4m3":
        fields, stored_zeros = padded.to(torch.float8_e4m3fn).view(torch.uint8), torch.zeros_like(scales)
    else:
        fields = padded - least
        stored_zeros = (
            scales.new_full(scales.shape, 8.0 if format == "int4" else 0.0) if zeros is None else zeros
        ) - least
    most = 127 if format == "int4" else 255  # of int4 what the kernels of 16-bit types hold
    if stored_zeros.numel() and (stored_zeros.min() < 0 or stored_zeros.max() > most):
        raise ValueError(
            f"from_numbers: zeros: expected values from {least} to {least + most} for {format}, got "
            f"{stored_zeros.min() + least} to {stored_zeros.max() + least}"
        )
    steps = ((scales.float().contiguous().view(torch.int32) + 128) & ~255) | stored_zeros.to(torch.int32)
    words = torch.cat([_words(fields.to(torch.uint8), bits), steps[..., None]], 2).flatten(1)
    return PackedWeight(format, _rows(words, back=False).view(PACKED_DTYPES[format]), (n, groups * group), order)


def _quantize(w: Tensor, format: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers, scales and zeros of w [N, groups, group]."""
    largest = w.abs().amax(-1) if w.numel() else w.new_zeros(w.shape[:-1])
    if format == "fp8_e4m3":
        scales, divisor = _steps(largest / _LARGEST_FP8)
        return (w / divisor[..., None]).clamp(-_LARGEST_FP8, _LARGEST_FP8), scales, None
    least, most = _RANGES[format]
    if symmetric:
        middle, ends = (8, 7) if format == "int4" else (0, 127)
        scales, divisor = _steps(largest / ends)
        return ((w / divisor[..., None]).round() + middle).clamp(middle - ends, middle + ends), scales, None
    low = (w.amin(-1) if w.numel() else largest).clamp(max=0)
    high = (w.amax(-1) if w.numel() else largest).clamp(min=0)
    scales, divisor = _steps((high - low) / (most - least))
    zeros = least - (low / divisor).round()
    return ((w / divisor[..., None]).round() + zeros[..., None]).clamp(least, most), scales, zeros


def _steps(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as they are stored, not below the given ones, and what to divide by."""
    stored = ((scales.contiguous().view(torch.int32) + 255) & ~255).view(torch.float32)
    return stored, torch.where(stored > 0, stored, 1.0)


def groups_of(inputs: int, row_bytes: int, bits: int) -> int:
    """Groups of inputs in a row; -1 where no number of them has so many bytes."""
    steps = row_bytes - (inputs + _PADDED - 1) // _PADDED * _PADDED * bits // 8
    groups = steps // 4
    if inputs == 0:
        return 0 if row_bytes == 0 else -1
    if steps <= 0 or steps % 4 or inputs % groups or (groups > 1 and inputs // groups % _PADDED):
        return -1
    return groups


def _words(fields: Tensor, bits: int) -> Tensor:
    """Fields [..., K], uint8 below 2^bits, as int32 words [..., K * bits / 32], the first field lowest."""
    each = 32 // bits
    by_word = fields.unflatten(-1, (-1, each))
    words = torch.zeros(by_word.shape[:-1], dtype=torch.int32, device=fields.device)
    for i in range(each):
        words |= by_word[..., i].to(torch.int32) << (i * bits)
    return words


def _fields(words: Tensor, bits: int) -> Tensor:
    """The inverse of _words, int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def _rows(words: Tensor, back: bool) -> Tensor:
    """Rows of words [N, R] as they lie in memory: 32 rows form a panel, the last one of what is left, and a panel is
    transposed, [R, rows]. A row is, for each group of inputs, its numbers and a word of its scale, a float32 without
    its last 8 bits, and its zero in these (int8's and its numbers plus 128). ``back``: the rows of what lies there."""
    n, r = words.shape
    whole = n - n % _PANEL

    def turned(some: Tensor, width: int) -> Tensor:
        inner = (r, width) if back else (width, r)
        return some.reshape(len(some) // max(1, width), *inner).transpose(1, 2).reshape(some.shape)

    return torch.cat([turned(words[:whole], _PANEL), turned(words[whole:], n - whole)])
