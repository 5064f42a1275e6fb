"""Losses that keep routers balanced and their logits small, over whole batches too."""

from __future__ import annotations

import torch
from torch import Tensor

_CONVENTIONS = ("switch", "hf", "gshard")


def _counts(ids: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen, float32 [E], and how many choices there are; -1 counts in the latter only."""
    kept = ids >= 0
    if mask is not None:
        kept = kept & mask[:, None]
    counts = torch.zeros(num_experts, dtype=torch.float32, device=ids.device)
    counts.index_add_(0, ids.clamp(min=0).flatten().long(), kept.flatten().float())
    rows = ids.shape[0] if mask is None else mask.sum()
    return counts, torch.as_tensor(rows * ids.shape[1], dtype=torch.float32, device=ids.device)


def _check(name: str, x: Tensor, layout: str, mask: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape {layout}, got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        raise ValueError(
            f"{name.split(':')[0]}: mask: expected bool [{x.shape[0]}], got {mask.dtype} {list(mask.shape)}"
        )


def load_balancing_loss(
    probs: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    convention: str = "switch",
    frequencies: Tensor | None = None,
) -> Tensor:
    """Is small where experts are chosen equally often: ``E * sum_e f_e P_e``, with f_e the fraction of choices that
    fall on e (a constant) and P_e the mean probability of e, over the tokens of one layer.

    Args:
        probs: ``[N, E]``, rows that sum to 1: the softmax, or sigmoids divided by their sum.
        ids: int32 ``[N, K]``; a dropped choice, -1, is one that falls on no expert.
        mask: bool ``[N]``, the tokens that count (no padding).
        convention: ``"switch"`` (arXiv 2101.03961): as above, 1 where all is even; ``"hf"``: f summed over the K
            choices, K times that (transformers); ``"gshard"`` (arXiv 2006.16668): first choices only, divided by E^2.
        frequencies: float ``[E]``, f of more than this batch (:class:`GlobalFrequencies`; arXiv 2501.11873).

    Returns:
        A scalar, float32 (float64 for float64 probs); 0 where no token counts.

    Raises:
        ValueError: an unknown convention, or shapes that do not fit.
    """
    if convention not in _CONVENTIONS:
        raise ValueError(
            f"load_balancing_loss: convention: expected one of {', '.join(_CONVENTIONS)}, got {convention}"
        )
    _check("load_balancing_loss: probs", probs, "[N, E]", mask)
    if ids.dim() != 2 or ids.shape[0] != probs.shape[0]:
        raise ValueError(f"load_balancing_loss: ids: expected shape [{probs.shape[0]}, K], got {list(ids.shape)}")
    experts, choices = probs.shape[1], ids.shape[1]
    if frequencies is None:
        counted = ids[:, :1] if convention == "gshard" else ids
        counts, total = _counts(counted, experts, mask)
        frequencies = counts / total.clamp(min=1)
    elif frequencies.shape != (experts,):
        raise ValueError(f"load_balancing_loss: frequencies: expected shape [{experts}], got {list(frequencies.shape)}")
    wide = probs if probs.dtype == torch.float64 else probs.float()
    if mask is None:
        mean = wide.sum(0) / max(1, probs.shape[0])
    else:
        mean = torch.where(mask[:, None], wide, 0).sum(0) / mask.sum().clamp(min=1)
    loss = (frequencies.detach().to(mean.dtype) * mean).sum()
    factor = {"switch": float(experts), "hf": float(experts * choices), "gshard": 1.0 / experts}
    return loss * factor[convention]


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of the squared log-sum-exp of their logits ``[N, E]`` (ST-MoE, arXiv 2202.08906).

    mask: bool ``[N]``, the tokens that count. Returns a scalar, float32 (float64 for float64 logits); 0 for no token.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check("router_z_loss: logits", logits, "[N, E]", mask)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if mask is None:
        return wide.logsumexp(-1).square().sum() / max(1, wide.shape[0])
    squares = torch.where(mask[:, None], wide, 0).logsumexp(-1).square()
    return torch.where(mask, squares, 0).sum() / mask.sum().clamp(min=1)


class GlobalFrequencies:
    """How often each expert was chosen over micro-batches and processes: the f of :func:`load_balancing_loss` over
    the global batch (arXiv 2501.11873). ``update`` after each routing, ``all_reduce`` where there are several
    processes, ``value`` for the loss, ``reset`` after the optimiser's step."""

    def __init__(self, num_experts: int) -> None:
        if num_experts < 1:
            raise ValueError(f"GlobalFrequencies: num_experts: expected 1 or more, got {num_experts}")
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._own = torch.zeros(self.num_experts + 1, dtype=torch.float64)  # choices of each expert; of all
        self._shared = torch.zeros_like(self._own)

    def update(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Counts the choices int32 ``[N, K]`` of a batch, of the tokens of mask (bool ``[N]``) only."""
        _check("GlobalFrequencies: ids", ids, "[N, K]", mask)
        counts, total = _counts(ids, self.num_experts, mask)
        self._own, self._shared = (x.to(ids.device) for x in (self._own, self._shared))
        self._own += torch.cat([counts, total[None]])

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Adds what was counted here since the last call to the counts of all processes. Every one has to call it."""
        torch.distributed.all_reduce(self._own, group=group)
        self._shared += self._own
        self._own.zero_()

    def value(self) -> Tensor:
        """float32 ``[E]``, the fraction of choices that fell on each expert; zeros before the first."""
        counts = self._own + self._shared
        return (counts[:-1] / counts[-1].clamp(min=1)).float()
