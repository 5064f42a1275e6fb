"""Layers in few bits in a checkpoint of ours: the tensors of a packed weight under the layer's name in the model, and a
``quantization_config`` with ``quant_method`` "effops". Other layers are stored as they always are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effops.models.checkpoint import TensorFiles
from effops.models.errors import CheckpointError
from effops.nn import Linear, MoE, PackedLinear
from effops.nn.panels import Panels
from effops.ops.packed_experts import PackedExperts
from effops.ops.packed_weight import PackedWeight

_PREFIX = "packed."
_PANELS = ("gate_up", "down")
_TENSORS = ("data", "order", "about", *_PANELS, "gate_up_scale", "down_scale", "bias_gate_up", "bias_down")


def packed_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The packed layers' tensors, and the ``quantization_config``; None where no layer is packed.

    Raises:
        RuntimeError: experts in panels that are not quantised.
    """
    named: dict[str, Tensor] = {}
    activations: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            named |= module.weight.tensors(f"{_PREFIX}{name}.")
            if module.activation is not None:
                activations[name] = module.activation
        elif isinstance(module, Panels):
            if not module.quantized:
                raise RuntimeError(
                    "save_pretrained: expected experts with parameters, got weights in panels (save first)"
                )
            named |= {f"{_PREFIX}{name}.{n}": t.contiguous() for n, t in module.named_buffers()}
    config: dict[str, Any] = {"quant_method": "effops"}
    return named, config | ({"activations": activations} if activations else {}) if named else None


def place_packed(model: nn.Module, files: TensorFiles, activations: dict[str, str]) -> set[str]:
    """Puts the packed layers that the files hold in their places; biases of linear layers are still to be loaded.
    Returns the names of the tensors that were read."""
    layers: dict[str, dict[str, Tensor]] = {}
    used = {name for name in files.names() if name.startswith(_PREFIX)}
    for name in used:
        layer, _, own = name.removeprefix(_PREFIX).rpartition(".")
        if own not in _TENSORS:
            raise CheckpointError(str(files.source), name, f"expected one of {', '.join(_TENSORS)} of a layer")
        layers.setdefault(layer, {})[own] = files.read(name)
    for name, tensors in layers.items():
        parent, _, child = name.rpartition(".")
        try:
            module: Any = model.get_submodule(parent)
        except AttributeError:
            raise CheckpointError(
                str(files.source), _PREFIX + name, "expected a layer of the model, got none"
            ) from None
        if isinstance(module, MoE) and child == "panels":
            _place_experts(module, tensors, f"{files.source}: {name}")
            continue
        linear = module._modules.get(child)
        if type(linear) is not Linear:
            got = type(linear).__name__ if linear is not None else "none"
            raise CheckpointError(str(files.source), _PREFIX + name, f"expected a linear layer of the model, got {got}")
        try:
            weight = PackedWeight.from_tensors(tensors)
            if weight.shape != linear.weight.shape:
                raise ValueError(f"expected a weight of {list(linear.weight.shape)}, got {list(weight.shape)}")
            packed = PackedLinear(weight, linear.bias, activations.get(name))
        except ValueError as error:
            raise CheckpointError(str(files.source), _PREFIX + name, str(error)) from None
        module._modules[child] = packed.to(linear.weight.device)
    unknown = sorted(activations.keys() - layers.keys())
    if unknown:
        raise CheckpointError(str(files.source), "activations", f"expected packed layers, got {unknown[0]!r}")
    return used


def _place_experts(moe: MoE, tensors: dict[str, Tensor], source: str) -> None:
    if moe.w_gate_up is None or moe.w_down is None:
        raise CheckpointError(source, "gate_up", "expected a layer of experts with parameters, got panels")
    if moe.w_gate_up.device.type != "cpu":
        raise CheckpointError(source, "gate_up", f"expected a model on the CPU, got {moe.w_gate_up.device}")
    shapes = [(w.shape[0], w.shape[1], w.shape[2]) for w in (moe.w_gate_up, moe.w_down)]
    gated = shapes[0][1] != shapes[1][2]
    forms = []
    for name, shape in zip(_PANELS, shapes, strict=True):
        if name not in tensors:
            raise CheckpointError(source, name, "expected a tensor, got nothing")
        form = PackedExperts.of_data(tensors[name], tensors.get(f"{name}_scale"), shape, gated and name == "gate_up")
        if form is None:
            got = f"{list(tensors[name].shape)} of {tensors[name].dtype}"
            raise CheckpointError(source, name, f"expected panels of {list(shape)}, got {got}")
        forms.append(form)
    biases = tensors.get("bias_gate_up"), tensors.get("bias_down")
    for bias, shape, name in zip(biases, shapes, ("bias_gate_up", "bias_down"), strict=True):
        if (bias is None) != (moe._parameters[name] is None) or (bias is not None and bias.shape != shape[:2]):
            raise CheckpointError(source, name, f"expected {list(shape[:2])} where there is a bias, got another")
    dtype = moe.router.weight.dtype
    own = [None if b is None else b.to(dtype) for b in biases]
    with torch.no_grad():
        Panels((forms[0], forms[1]), (own[0], own[1])).replace(moe, MoE.WEIGHTS)
