"""Linear layers with packed weights, and models whose linear layers become such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import ops
from effops.nn import functional
from effops.nn.basic import LINEARS, Linear, RMSNorm
from effops.nn.moe import MoE
from effops.ops.packed_weight import BITS, FLOATS, PackedWeight

LARGEST_INT8_GROUP = 1 << 16  # csrc/common/packed_problem.h


class PackedLinear(nn.Module):
    """:class:`effops.nn.Linear` with a quantised weight: x [...,K] · weight [N,K]ᵀ + bias, plus an optional residual.

    The weight's tensors are buffers, so that ``state_dict`` and ``load_state_dict`` hold them bit for bit. A gradient
    reaches x, the bias and the residual through the dequantised weight; the weight has none. ``activation``: as in
    :func:`effops.ops.packed_linear`, where no gradient is asked for.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> None:
        super().__init__()
        if activation is not None:
            _check_activation(weight, activation)
        self.format, self.activation = weight.format, activation
        self._packed = weight
        tensors = weight.tensors()
        for name in ("data", "order", "about"):
            self.register_buffer(name, tensors.get(name))
        trained = bias.requires_grad if isinstance(bias, nn.Parameter) else True
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), trained))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "int4",
        *,
        group_size: int | None = None,
        symmetric: bool = True,
        activation: str | None = None,
    ) -> PackedLinear:
        """Of a layer with ``weight`` [N,K] and ``bias``, as :func:`effops.ops.pack_weight` packs it."""
        own: Any = linear
        packed = ops.pack_weight(own.weight, format, group_size=group_size, symmetric=symmetric)
        return cls(packed, own.bias, activation)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        kept: Any = self._buffers["data"]
        super()._apply(fn, recurse)
        moved: Any = self._buffers["data"]
        if (
            self._packed.quantized_shape is not None and moved.dtype != kept.dtype
        ):  # float8 stays what it is in a model of another dtype
            self._buffers["data"] = kept.to(moved.device)
        return self

    @property
    def weight(self) -> PackedWeight:
        own: Any = self._buffers
        packed = self._packed
        if packed.data is not own["data"] or packed.order is not own["order"]:
            packed = self._packed = replace(packed, data=own["data"], order=own["order"])
        return packed

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Another format, width or group in buffers of the same size is an error, not another reading of the bytes."""
        errors: list[str] = rest[-1]
        data, about = (state_dict.get(f"{prefix}{name}") for name in ("data", "about"))
        own: Any = self._buffers
        if data is not None and data.dtype != own["data"].dtype:
            errors.append(f"PackedLinear: {prefix}data: expected {own['data'].dtype}, got {data.dtype}")
            return
        expected = [*self._packed.shape, self._packed.group_size or 0]
        if about is not None and about.tolist() != expected:
            errors.append(f"PackedLinear: {prefix}about: expected {expected}, got {about.tolist()}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}, format={self.format}"

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None, gated: bool = False
    ) -> Tensor:
        bias: Tensor | None = self._parameters["bias"]
        first = None if norm is None else norm._parameters["weight"]
        eps = 1e-6 if norm is None else norm.eps
        weight = self.weight
        if functional.takes_torch_path(x, bias, residual, first):
            if norm is not None:
                x = functional.rms_norm(x, norm.weight, eps)
            if gated:
                x = functional.silu_mul(x)
            y = F.linear(x, weight.dequantize().to(x.dtype), bias)
            return y if residual is None else y + residual
        if bias is not None and bias.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
            bias = bias.to(x.dtype)
        return ops.packed_linear(
            x, weight, bias, residual=residual, norm=first, norm_eps=eps, gated=gated, activation=self.activation
        )


def _check_activation(weight: PackedWeight, activation: str) -> None:
    if activation != "int8" or weight.format not in ("int8", "int4"):
        got = f"{activation!r} beside {weight.format}"
        raise ValueError(f"PackedLinear: activation: expected None, or int8 beside int8 and int4 weights, got {got}")
    if (weight.group_size or 0) > LARGEST_INT8_GROUP:
        raise ValueError(
            f"PackedLinear: activation: expected groups of at most {LARGEST_INT8_GROUP} inputs, got {weight.group_size}"
        )


Place = tuple[dict[str, Any], str]  # a module's dictionary, and a name in it


def places_of(linear: Any) -> list[Place] | None:
    """Where the weight, as the ops take it, and the bias of a layer are; None where it is not one of this package's, or
    the ops have no such weight."""
    if type(linear) is Linear:
        return [(linear._parameters, "weight"), (linear._parameters, "bias")]
    if type(linear) is PackedLinear and linear._buffers["order"] is None and linear.activation is None:
        return [(linear._buffers, "data"), (linear._parameters, "bias")]
    return None


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize_` did to a layer, or to the weights of its experts."""

    name: str
    shape: tuple[int, ...]
    nbytes_before: int
    nbytes: int


def quantize_(
    model: nn.Module,
    format: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    skip: Sequence[str] = ("*lm_head",),
    calibration: Tensor | None = None,
    activation: str | None = None,
) -> list[Quantized]:
    """Replaces every linear layer of a model, torch's or this package's, by a :class:`PackedLinear`, and the experts of
    every :class:`MoE` by panels (``MoE.pack_``), in place.

    Args:
        format, group_size, symmetric: as in :func:`effops.ops.pack_weight`, a floating format that of the model's
            dtype. A group size that does not divide a layer's inputs is an error that names the layer.
        skip: patterns of names of layers that stay as they are. A weight that two modules share stays in any case, and
            so does what is packed already.
        calibration: tokens int64 [N,T] of text like what the model will see. Columns of the weights of decoder layers
            are then scaled before they are rounded, by the sizes of their inputs, so that the outputs change least
            (AWQ, arXiv 2306.00978). Layers with experts, and other modules, are rounded as they are.
        activation: of the linear layers, as in :func:`effops.ops.packed_linear`.

    Returns:
        The layers that were replaced.

    Raises:
        ValueError: a weight that cannot be packed so; nothing is replaced then.
    """
    layers, experts = _chosen(model, skip)
    for name, weight in [*((name, layer.weight) for name, _, _, layer in layers), *_weights_of(experts)]:
        with _named(name):
            _check_weight(weight, format, group_size, symmetric, activation)
    if calibration is not None:
        from effops.nn.scaling import scale_

        names = {name for name, *_ in layers}
        kept = {layer for name, _, _, layer in _linear_layers(model) if name not in names}
        options: Any = {"group_size": group_size, "symmetric": symmetric}
        scale_(
            model,
            calibration,
            lambda w: ops.pack_weight(w, format, **options).dequantize(),
            lambda layer: layer not in kept,
        )
    packed: list[tuple[nn.Module, str, PackedLinear]] = []
    made: dict[nn.Module, PackedLinear] = {}  # a layer in two places stays one
    report = []
    for name, parent, child, linear in layers:
        if linear not in made:
            with _named(name):
                new = PackedLinear.from_linear(
                    linear, format, group_size=group_size, symmetric=symmetric, activation=activation
                )
            made[linear] = new.train(linear.training)
            report.append(Quantized(name, new.weight.shape, linear.weight.nbytes, new.weight.nbytes))
        packed.append((parent, child, made[linear]))
    panels = []
    for name, module in experts:
        with _named(name):
            panels.append(module.panels_of(format, group_size=group_size, symmetric=symmetric))
        for (child, weight), form in zip(_weights_of([(name, module)]), panels[-1].weights, strict=True):
            report.append(Quantized(child, form.shape, weight.nbytes, form.nbytes))
    for parent, child, new in packed:
        setattr(parent, child, new)
    for (_, module), own in zip(experts, panels, strict=True):
        own.replace(module, MoE.WEIGHTS)
    return report


LinearPlace = tuple[str, nn.Module, str, Any]  # a layer's name, its module, its name there, the layer
Experts = list[tuple[str, MoE]]


def _chosen(model: nn.Module, skip: Sequence[str]) -> tuple[list[LinearPlace], Experts]:
    """The layers, and those with experts, that are to be packed."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1

    def chosen(name: str, *weights: Any) -> bool:
        shared = any(counts.get(id(w), 1) > 1 for w in weights)  # one that is computed from parameters is nobody else's
        return not shared and not any(fnmatchcase(name, pattern) for pattern in skip)

    return (
        [place for place in _linear_layers(model) if chosen(place[0], place[3].weight)],
        [(name, module) for name, module in model.named_modules()
         if type(module) is MoE and module.panels is None and chosen(name, module.w_gate_up, module.w_down)],
    )  # fmt: skip


def _weights_of(experts: Experts) -> list[tuple[str, Any]]:
    return [(f"{name}.{child}".lstrip("."), m._parameters[child]) for name, m in experts for child in MoE.WEIGHTS]


def _check_weight(weight: Tensor, format: str, group_size: int | None, symmetric: bool, activation: str | None) -> None:
    """All that may be wrong, before anything is changed."""
    if format in FLOATS and weight.dtype != FLOATS[format]:
        got = f"{format} for {weight.dtype}"
        raise ValueError(f"PackedLinear: format: expected few bits or what the model's dtype is, got {got}")
    if format in BITS and not weight.isfinite().all():
        raise ValueError(f"pack_weight: w: expected finite values for {format}, got NaN or inf")
    width_alone = ops.pack_weight(weight.flatten(0, -2)[:0], format, group_size=group_size, symmetric=symmetric)
    if activation is not None and weight.dim() == 2:
        _check_activation(width_alone, activation)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"quantize_: {name}: {error}") from None


def _linear_layers(model: nn.Module) -> Iterator[LinearPlace]:
    for name, module in model.named_modules():
        for child, layer in module._modules.items():
            if type(layer) in LINEARS:
                yield f"{name}.{child}" if name else child, module, child, layer
