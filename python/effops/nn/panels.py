"""The weights of experts in panels, in place of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effops import ops
from effops.ops.packed_experts import PackedExperts
from effops.ops.packed_weight import BITS


class Panels(nn.Module):
    """What :func:`effops.ops.fused_experts` takes for a layer: weights in panels, biases in halves. Once they took the
    place of a module's parameters (``replace``), it holds them as ``panels``."""

    bias_gate_up: Tensor | None
    bias_down: Tensor | None

    def __init__(
        self, packed: tuple[PackedExperts, PackedExperts], biases: tuple[Tensor | None, Tensor | None]
    ) -> None:
        super().__init__()
        self._forms = packed
        for name, own in zip(("gate_up", "down"), packed, strict=True):
            self.register_buffer(name, own.data)
            self.register_buffer(f"{name}_scale", own.scale)
        self.register_buffer("bias_gate_up", biases[0])
        self.register_buffer("bias_down", biases[1])

    @classmethod
    def pack(
        cls,
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        format: str | None,
        interleaved: bool,
        **groups: Any,
    ) -> Panels:
        """Of plain weights, as :func:`effops.ops.pack_expert_layer` packs them."""
        with torch.no_grad():
            packed = ops.pack_expert_layer(*weights, format, interleaved=interleaved, **groups)
            first, second = (b if b is None else b.detach() for b in biases)
            if first is not None and interleaved:
                first = torch.cat([first[:, ::2], first[:, 1::2]], 1)
        return cls(packed, (first, second))

    @property
    def quantized(self) -> bool:
        return self._forms[0].format in BITS

    def replace(self, module: nn.Module, names: Iterable[str], saved: bool = True) -> None:
        """``names`` are no longer the module's parameters. ``saved``: ``state_dict`` has quantised panels, bit for bit;
        others, which are another order of the parameters, it refuses."""
        for name in names:
            module._parameters[name] = None
        module.register_module("panels", self)
        if not (saved and self.quantized):
            module.register_state_dict_pre_hook(_refuse)

    @property
    def weights(self) -> tuple[PackedExperts, PackedExperts]:
        own: Any = self._buffers
        first, second = self._forms
        if first.data is not own["gate_up"] or second.data is not own["down"]:
            first = replace(first, data=own["gate_up"], scale=own["gate_up_scale"])
            second = replace(second, data=own["down"], scale=own["down_scale"])
            self._forms = first, second
        return first, second

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Another format in buffers of the same size is an error, not another reading of the bytes."""
        errors: list[str] = rest[-1]
        for name in ("gate_up", "down"):
            given, own = state_dict.get(f"{prefix}{name}"), self._buffers[name]
            if given is not None and own is not None and given.dtype != own.dtype:
                errors.append(f"Panels: {prefix}{name}: expected {own.dtype}, got {given.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Panels:
        """Panels stay as they are: their order is the dtype's."""
        kept: Any = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, t in kept.items():
            moved: Any = self._buffers[name]
            if t is not None and not name.startswith("bias") and moved.dtype != t.dtype:
                if not self.quantized:
                    raise RuntimeError(f"Panels: {name}: expected to stay {t.dtype}, got a cast to {moved.dtype}")
                self._buffers[name] = t.to(moved.device)
        return self

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
        """The layer's output of x [N,d]."""
        own: Any = self._buffers
        return ops.fused_experts(
            x, *self.weights, weights, ids, activation=activation, bias_gate_up=own["bias_gate_up"],
            bias_down=own["bias_down"],
        )  # fmt: skip


def _refuse(module: nn.Module, *_: Any) -> None:
    raise RuntimeError(
        f"{type(module).__name__}: state_dict: expected experts with parameters, got weights in panels (save first)"
    )
