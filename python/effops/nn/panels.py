"""The weights of experts in panels, in place of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effops import ops
from effops.ops.packed_experts import PackedExperts


class Panels:
    """What :func:`effops.ops.fused_experts` takes for a layer: weights in panels, biases in halves. ``names`` were the
    parameters; the module, which holds the panels as ``panels``, no longer has them and cannot be saved."""

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        format: str | None,
        interleaved: bool,
    ) -> None:
        with torch.no_grad():
            self.weights: tuple[PackedExperts, PackedExperts] = ops.pack_expert_layer(
                *weights, format, interleaved=interleaved
            )
            first, self.bias_down = (b if b is None else b.detach() for b in biases)
            if first is not None and interleaved:
                first = torch.cat([first[:, ::2], first[:, 1::2]], 1)
            self.bias_gate_up = first
        for name in names:
            module._parameters[name] = None
        module.panels = self  # type: ignore[assignment]
        module.register_state_dict_pre_hook(_refuse)

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
        """The layer's output of x [N,d]."""
        return ops.fused_experts(
            x, *self.weights, weights, ids, activation=activation, bias_gate_up=self.bias_gate_up,
            bias_down=self.bias_down,
        )  # fmt: skip


def _refuse(module: nn.Module, *_: Any) -> None:
    raise RuntimeError(
        f"{type(module).__name__}: state_dict: expected experts with parameters, got weights in panels (save first)"
    )
