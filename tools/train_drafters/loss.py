"""Cross entropy over a whole vocabulary, cheap on a CPU: bf16 products, the gradient made in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WARMUP_STEPS = 40


class HeadCrossEntropy(torch.autograd.Function):
    """Sum of scales[k] times the cross entropy of row r of head k, of logits z[k] · weight^T.

    z is bf16 [K, R, d], weight bf16 [V, d], targets int64 [K, R] with -1 for none. A share of each target is soft:
    teacher bf16 [R + K - 1, V], whose row r + k is the frozen model's distribution of the target of z[k, r]. Returns
    the objective and, without a gradient, the nats of the true tokens alone, float32 [K, R].
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, targets: Tensor, teacher: Tensor, share: float, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, rows, size = z.shape
        error = torch.softmax((z.reshape(-1, size) @ weight.t()).view(heads, rows, -1), -1)
        real = targets >= 0
        index = targets.clamp(min=0).unsqueeze(2)
        nats = -error.gather(2, index).squeeze(2).float().clamp(min=1e-30).log() * real
        total = (nats.sum(1) * scales).sum()
        if share:
            for k in range(heads):
                error[k].sub_(teacher[k : k + rows], alpha=share)
        hard = torch.full_like(index, share - 1, dtype=error.dtype)
        error.scatter_add_(2, index, hard)
        factor = (scales[:, None] * real).unsqueeze(2).to(z.dtype)
        error = error.view(heads * rows, -1)
        ctx.z_grad = (error @ weight).view_as(z) * factor
        ctx.weight_grad = None
        if ctx.needs_input_grad[1]:
            ctx.weight_grad = error.t() @ (z * factor).view(heads * rows, size)
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weight_grad = None if ctx.weight_grad is None else ctx.weight_grad * gradient
        return ctx.z_grad * gradient, weight_grad, None, None, None, None


def cosine_factor(step: int, total_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine to zero at total_steps."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS))
