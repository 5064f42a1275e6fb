"""Muon (Jordan et al., 2024) for stacks of matrices: all of one shape are orthogonalised in one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ of a stack [B,m,n], m <= n: a quintic Newton-Schulz iteration in ``dtype``."""
    a, b, c = COEFFICIENTS
    x = (stack / stack.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class StackedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, decoupled weight decay and steps as large as AdamW's (0.2 sqrt(max(m, n))).

    Parameters are matrices [m,n] or stacks [E,m,n]; a group's ``parts`` says of how many matrices the rows of each
    consist (2 where gate and up projections are fused). Matrices are orthogonalised in ``dtype``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, float, bool, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                stack = direction.reshape(-1, rows, columns)
                tall = rows > columns
                stack = stack.mT if tall else stack
                p.mul_(1 - group["lr"] * group["weight_decay"])
                by_shape[stack.shape[1], stack.shape[2]].append((p, group["lr"], tall, stack))
        for (_, longer), entries in by_shape.items():
            updates = orthogonalise(torch.cat([stack for *_, stack in entries]), self.dtype)
            parts = updates.split([len(stack) for *_, stack in entries])
            for (p, lr, tall, _), update in zip(entries, parts, strict=True):
                update = update.mT if tall else update
                p.add_(update.reshape(p.shape), alpha=-lr * 0.2 * longer**0.5)
