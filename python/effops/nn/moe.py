"""Mixture of experts: a router, experts, and optional shared experts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import ops
from effops.nn.basic import MLP, Linear, RMSNorm, _empty
from effops.nn.panels import Panels

LOSSES = ("balance", "z")


class Routing(NamedTuple):
    """What a router says of N tokens: logits [N,E], weights [N,K] float32 and ids int32 [N,K]; float64 for float64."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


class Router(nn.Module):
    """Picks ``k`` of ``num_experts`` experts for each token: x [N,d] · weight [E,d]ᵀ, then ``ops.topk_routing``.

    Logits are computed in float32 whatever x's dtype (ST-MoE, arXiv:2202.08906), float64 for float64. ``scoring``,
    ``renormalize``, ``scale``, ``groups``, ``topk_group`` and ``group_score`` are those of the op. ``selection_bias``
    True adds the buffer of that name, float32 [E], to the scores when experts are chosen but not to the weights
    (DeepSeek-V3, arXiv:2412.19437); it stays float32 when the module is cast. :class:`BiasBalancer` moves it.

    Raises:
        ValueError: ``k`` is not in 1 to ``num_experts``, or they are not a multiple of ``groups``.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = False,
        groups: int = 1,
        topk_group: int = 1,
        group_score: str = "max",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"Router: k: expected 1 to num_experts ({num_experts}), got {k}")
        if groups < 1 or num_experts % groups:
            raise ValueError(f"Router: groups: expected a divisor of num_experts ({num_experts}), got {groups}")
        self.num_experts, self.k = num_experts, k
        self.options: dict[str, Any] = {
            "scoring": scoring, "renormalize": renormalize, "scale": scale,
            "groups": groups, "topk_group": topk_group, "group_score": group_score,
        }  # fmt: skip
        self.weight = _empty(num_experts, hidden_size, dtype=dtype, device=device)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if selection_bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor) -> Routing:
        """Logits, weights and ids of x [N,d]."""
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        logits = F.linear(x.to(wide), self.weight.to(wide))
        weights, ids = ops.topk_routing(logits, self.k, bias=self.selection_bias, **self.options)
        return Routing(logits, weights, ids)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self


class MoE(nn.Module):
    """x [...,d] to the weighted sum of the outputs of each token's ``k`` experts, plus shared experts.

    An expert is down(act(gate(x)) · up(x)), or down(act(up(x))) if not ``gated``. The parameters are ``router.weight``
    [E,d], ``w_gate_up`` [E,2f,d] ([E,f,d] without a gate; gate rows first, or alternating if ``interleaved``),
    ``w_down`` [E,d,f] and, with ``bias``, ``bias_gate_up`` and ``bias_down``. ``shared_size`` adds an MLP of that width
    for every token, ``shared_gate`` multiplies its output by sigmoid(x · shared_gate.weight [1,d]ᵀ) (Qwen2-MoE,
    arXiv:2407.10671). ``router_options`` are those of :class:`Router`.

    ``capacity_factor`` limits an expert to ``ops.expert_capacity`` tokens of a call; further ones are dropped by
    ``drop_priority`` (``ops.limit_capacity``) and get nothing from it. None drops nobody.

    ``collect`` names auxiliary losses that every call leaves in ``losses``, with the gradient to the router:
    "balance" (``ops.load_balancing_loss`` of the probabilities and the ids before capacity; Switch, arXiv:2101.03961)
    and "z" (``ops.router_z_loss``; ST-MoE). While training, ``ids`` int32 [N,K] are those of the last call.

    Raises:
        ValueError: an unknown loss, or ``k`` or groups that :class:`Router` refuses.
    """

    WEIGHTS = ("w_gate_up", "w_down")

    w_gate_up: nn.Parameter | None
    w_down: nn.Parameter | None
    bias_gate_up: nn.Parameter | None
    bias_down: nn.Parameter | None
    shared: MLP | None
    shared_gate: Linear | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        k: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        interleaved: bool = False,
        bias: bool = False,
        shared_size: int = 0,
        shared_gate: bool = False,
        capacity_factor: float | None = None,
        drop_priority: str = "choice",
        collect: Collection[str] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        for name in collect:
            if name not in LOSSES:
                raise ValueError(f"MoE: collect: expected some of {', '.join(LOSSES)}, got {name!r}")
        place: Any = {"dtype": dtype, "device": device}
        self.activation, self.interleaved = activation, interleaved
        self.capacity_factor, self.drop_priority = capacity_factor, drop_priority
        self.collect = tuple(collect)
        self.losses: dict[str, Tensor] = {}
        self.ids: Tensor | None = None
        rows = 2 * intermediate_size if gated else intermediate_size
        self.router = Router(hidden_size, num_experts, k, **router_options, **place)
        self.w_gate_up = _empty(num_experts, rows, hidden_size, **place)
        self.w_down = _empty(num_experts, hidden_size, intermediate_size, **place)
        self.register_parameter("bias_gate_up", _empty(num_experts, rows, **place) if bias else None)
        self.register_parameter("bias_down", _empty(num_experts, hidden_size, **place) if bias else None)
        self.register_module("panels", None)
        self.register_module("shared", MLP(hidden_size, shared_size, **place) if shared_size else None)
        self.register_module("shared_gate", Linear(hidden_size, 1, **place) if shared_size and shared_gate else None)

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor:
        """The experts' output for x [...,d], or for norm(x), plus the residual."""
        own: Any = self._modules
        x = x if norm is None else norm.forward(x)
        rows = x.reshape(-1, x.shape[-1])
        routing = own["router"].forward(rows)
        out = self._experts(rows, routing).view(x.shape)
        shared, gate = own["shared"], own["shared_gate"]
        if shared is None:
            return out if residual is None else residual + out
        out = out if residual is None else residual + out
        if gate is None:
            return shared.forward(x, out)
        return torch.addcmul(out, gate.forward(x).sigmoid(), shared.forward(x))

    def _experts(self, rows: Tensor, routing: Routing) -> Tensor:
        own: Any = self._parameters
        ids = routing.ids
        if self.training:
            self.ids = ids
        if self.collect:
            self.losses = self._losses(routing)
        if self.capacity_factor is not None:
            router: Any = self.router
            capacity = ops.expert_capacity(len(rows), router.k, router.num_experts, self.capacity_factor)
            scores = routing.weights.detach() if self.drop_priority == "score" else None
            ids = ops.limit_capacity(ids, router.num_experts, capacity, priority=self.drop_priority, scores=scores)
        panels: Any = self._modules["panels"]
        if panels is not None:
            return panels.run(rows, routing.weights, ids, self.activation)
        return ops.fused_experts(
            rows, own["w_gate_up"], own["w_down"], routing.weights, ids, activation=self.activation,
            interleaved=self.interleaved, bias_gate_up=own["bias_gate_up"], bias_down=own["bias_down"],
        )  # fmt: skip

    def pack_(self, format: str | None = None, *, group_size: int | None = None, symmetric: bool = True) -> MoE:
        """Moves the experts' weights into panels (``ops.pack_experts``), the fastest form for inference on CPU:
        ``format`` "f32", "bf16", "f16", "int8", "int4" or "fp8_e4m3", None for the dtype they have. The parameters are
        gone: the module is no longer trained, nor moved to a device; where experts are not quantised, neither saved nor
        cast.

        Raises:
            ValueError: an unknown format, weights in panels already or not on the CPU.
        """
        self.panels_of(format, group_size=group_size, symmetric=symmetric).replace(self, self.WEIGHTS)
        return self

    def panels_of(self, format: str | None, **groups: Any) -> Panels:
        """What ``pack_`` puts in the weights' place."""
        up, down = self.w_gate_up, self.w_down
        if up is None or down is None or up.device.type != "cpu":
            got = "panels" if up is None else f"device {up.device}"
            raise ValueError(f"MoE: pack_: expected weights on the CPU, got {got}")
        return Panels.pack((up, down), (self.bias_gate_up, self.bias_down), format, self.interleaved, **groups)

    def _losses(self, routing: Routing) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if "balance" in self.collect:
            router: Any = self.router
            scores = routing.logits.sigmoid() if router.options["scoring"] == "sigmoid" else None
            probs = routing.logits.softmax(-1) if scores is None else scores / scores.sum(-1, keepdim=True)
            losses["balance"] = ops.load_balancing_loss(probs, routing.ids)
        if "z" in self.collect:
            losses["z"] = ops.router_z_loss(routing.logits)
        return losses
