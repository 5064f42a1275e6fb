"""Losses of routers, written as their papers do."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(
    probs: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    convention: str = "switch",
    frequencies: Tensor | None = None,
) -> Tensor:
    """probs [N,E], ids [N,K], mask bool [N]. With f_e the fraction of choices that fall on e and P_e its mean
    probability: "switch" E Σ f_e P_e; "hf" E Σ_k Σ_e f_ke P_e with f_ke the fraction of tokens whose choice k is e;
    "gshard" the mean over experts of f_0e P_e. ``frequencies`` [E] replaces f (for "hf": f_ke summed over k, by K)."""
    wide = probs if probs.dtype == torch.float64 else probs.float()
    experts, choices = probs.shape[1], ids.shape[1]
    if mask is not None:
        wide, ids = wide[mask], ids[mask]
    if wide.shape[0] == 0:
        return wide.sum()
    mean = wide.mean(0)
    one_hot = (ids[..., None] == torch.arange(experts, device=ids.device)).to(wide.dtype)  # [N,K,E]
    by_choice = one_hot.mean(0)
    if convention == "hf":
        f = by_choice.sum(0) if frequencies is None else choices * frequencies
        return experts * (f * mean).sum()
    if convention == "gshard":
        return ((by_choice[0] if frequencies is None else frequencies) * mean).mean()
    return experts * ((by_choice.mean(0) if frequencies is None else frequencies) * mean).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of logsumexp(logits[t])², logits [N,E], mask bool [N]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        wide = wide[mask]
    return wide.exp().sum(-1).log().square().mean() if wide.shape[0] else wide.sum()
