"""What is composed of the ops of a mixture of experts: routed low-rank experts, expert choice, capacities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effops.ops.moe import grouped_mm, moe_permute, moe_sort, moe_unpermute


def lora_experts(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    ranks: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``base[t] + sum_j weights[t, j] * b_e a_e x[t]`` with ``e = ids[t, j]``: low-rank experts, or adapters of
    many kinds in one batch (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

    Args:
        x: ``[N, d]``; a: ``[E, r, d]``; b: ``[E, f, r]``, x's dtype.
        ids: int32 ``[N, K]`` in ``[-1, E)``; -1 adds nothing. weights: float32 ``[N, K]`` (float64 for float64).
        ranks: int32 ``[E]``, the rank of each expert where they differ; beyond it a and b are not read.
        base: ``[N, f]``.

    Returns:
        ``[N, f]``, x's dtype. Differentiable in x, a, b, weights and base.

    Raises:
        RuntimeError: of the ops it is composed of, under their names.
    """
    xp, offsets, inverse = moe_permute(x, ids, a.shape[0])
    low = grouped_mm(xp, a.mT, offsets, out_sizes=ranks)
    out = moe_unpermute(grouped_mm(low, b.mT, offsets, in_sizes=ranks), weights, inverse)
    return out if base is None else base + out


def expert_choice_routing(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert chooses tokens (arXiv 2202.09368): its ``capacity`` largest of the softmax over experts, ties to
    the lowest token.

    Args:
        logits: ``[N, E]``; capacity: in ``[1, N]``.

    Returns:
        weights ``[E, capacity]``, float32 (float64 for float64 logits), differentiable, and tokens int32 of that shape.

    Raises:
        ValueError: logits are no matrix, or the capacity is out of range.
    """
    if logits.dim() != 2:
        raise ValueError(f"expert_choice_routing: logits: expected shape [N, E], got {list(logits.shape)}")
    if not 1 <= capacity <= logits.shape[0]:
        raise ValueError(
            f"expert_choice_routing: capacity: expected a number in [1, {logits.shape[0]}] (N), got {capacity}"
        )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.to(wide).softmax(-1).t()
    best, tokens = scores.sort(dim=-1, descending=True, stable=True)
    return best[:, :capacity], tokens[:, :capacity].int()


def expert_capacity(tokens: int, k: int, num_experts: int, factor: float) -> int:
    """Slots an expert has where the load may exceed its even share by ``factor``: ``ceil(factor * tokens * k / E)``.

    Raises:
        ValueError: no experts, or a factor that is negative or not finite.
    """
    if num_experts < 1:
        raise ValueError(f"expert_capacity: num_experts: expected 1 or more, got {num_experts}")
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"expert_capacity: factor: expected a finite number of 0 or more, got {factor}")
    return math.ceil(factor * tokens * k / num_experts)


def limit_capacity(
    ids: Tensor, num_experts: int, capacity: int, *, priority: str = "choice", scores: Tensor | None = None
) -> Tensor:
    """ids with -1 where an expert has ``capacity`` earlier choices already. Weights stay as they are.

    Args:
        ids: int32 ``[N, K]`` in ``[-1, num_experts)``.
        priority: who comes first. ``"choice"``: all first choices in token order, then all second ones (GShard, arXiv
            2006.16668); ``"token"``: token by token (MegaBlocks, arXiv 2211.15841); ``"score"``: like ``"choice"``, but
            tokens in descending order of their score (V-MoE, arXiv 2106.05974).
        scores: ``[N]``, or ``[N, K]`` whose first column counts; with ``"score"`` only.

    Raises:
        ValueError: an unknown priority, a negative capacity, or scores missing, unwanted or of another shape.
        RuntimeError: of :func:`moe_sort`, for ids out of range.
    """
    if priority not in ("choice", "token", "score"):
        raise ValueError(f"limit_capacity: priority: expected choice, token or score, got {priority}")
    if capacity < 0:
        raise ValueError(f"limit_capacity: capacity: expected 0 or more, got {capacity}")
    if (scores is None) == (priority == "score"):
        raise ValueError(
            f"limit_capacity: scores: expected {'a tensor' if priority == 'score' else 'none'} for priority "
            f"{priority}, got {'none' if scores is None else 'a tensor'}"
        )
    if scores is not None and (scores.shape[:1] != ids.shape[:1] or scores.dim() not in (1, 2)):
        raise ValueError(f"limit_capacity: scores: expected shape [N] or [N, K], got {list(scores.shape)}")
    tokens = None
    if scores is not None:
        first = scores if scores.dim() == 1 else scores[:, 0]
        tokens = first.argsort(descending=True, stable=True)
    by_token = ids if tokens is None else ids[tokens]
    queue = by_token if priority == "token" else by_token.t()
    _, places, offsets = moe_sort(queue.reshape(-1, 1), num_experts)
    begins = torch.nn.functional.pad(offsets[:-1], (1, 0))
    ranks = (places.view(-1) - begins[queue.reshape(-1).clamp(min=0)]).view(queue.shape)
    ranks = ranks if priority == "token" else ranks.t()
    if tokens is not None:
        ranks = torch.empty_like(ranks).index_copy_(0, tokens, ranks)
    return torch.where(ranks < capacity, ids, -1)
