"""Balancing experts without a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.nn.moe import Router


class BiasBalancer:
    """Moves a router's selection bias towards equal load: b += rate · sign(mean(c) - c), c the tokens of each expert
    (DeepSeek-V3, arXiv:2412.19437; Wang et al., arXiv:2408.15664).

    Call ``observe`` with the ids of every micro-batch (``MoE.ids``), and ``step`` after the optimizer's; both outside
    of the forward pass. Where batches are split over processes, sum ``counts`` over them before ``step``.

    Raises:
        ValueError: the router has no selection bias, or ids name an expert that it has not.
    """

    def __init__(self, router: Router, rate: float = 1e-3) -> None:
        if router.selection_bias is None:
            raise ValueError("BiasBalancer: router: expected one with selection_bias=True, got one without")
        self.router, self.rate = router, rate
        self.counts = torch.zeros(router.num_experts, dtype=torch.int64, device=router.selection_bias.device)

    def observe(self, ids: Tensor) -> None:
        """Counts the tokens of each expert in ids int32 [N,K]; -1 is nobody's."""
        experts = self.router.num_experts
        if ids.numel() and int(ids.max()) >= experts:
            raise ValueError(f"BiasBalancer: ids: expected experts below {experts}, got {int(ids.max())}")
        self.counts += torch.bincount(ids[ids >= 0].long(), minlength=experts)

    def step(self) -> None:
        """Moves the bias by what was observed since the last step, and forgets it."""
        bias, counts = self.router.selection_bias, self.counts.double()
        assert bias is not None
        bias += self.rate * (counts.mean() - counts).sign().to(bias)
        self.counts.zero_()
