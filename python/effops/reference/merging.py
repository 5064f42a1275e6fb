"""Entries that leave a KV cache, merged into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference.attention import _compute_dtype


def unit_keys(k: Tensor) -> Tensor:
    """k [..., D] over its norms, in the compute type; zeros where a norm is no finite normal number."""
    wide = k.to(_compute_dtype(k))
    largest = wide.abs().amax(-1, keepdim=True) if k.shape[-1] else wide.sum(-1, keepdim=True)
    norm = largest * (wide / largest).square().sum(-1, keepdim=True).sqrt()
    usable = (norm >= torch.finfo(norm.dtype).tiny) & norm.isfinite()
    return torch.where(usable, wide / norm, 0)


def merged_rows(x: Tensor, kept: Tensor, nearest: Tensor, similarity: Tensor, merging: str) -> Tensor:
    """[n,D], in the compute type, of one head's keys or values x [len,D]: the entries kept int64 [n], each with the
    others that nearest [len] assigns to it."""
    wide = x.to(_compute_dtype(x))
    rows = wide[kept].clone()
    for i, own in enumerate(kept.tolist()):
        evicted = (nearest == i) & (torch.arange(len(x)) != own)
        e, count = wide[evicted], int(evicted.sum())
        if merging == "none" or count == 0:
            continue
        if merging == "pivotal":
            e = (e + wide[own]) / 2
        elif merging == "weighted":
            e = similarity[evicted].to(wide.dtype)[:, None] * e
        rows[i] = (wide[own] + e.sum(0)) / (count + 1)
    return rows


def merge_kv(
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    *,
    kv_lens: Tensor | None = None,
    merging: str = "pivotal",
    least_similarity: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaves in k [B,L,G,D], v [B,L,G,Dv], in the first rows of each head, its entries kept int32 [B,G,N] (ascending,
    then -1), each with the other entries below kv_lens int32 [B] merged into it whose keys it is nearest to by the
    cosine, of equals the first, unless that is below least_similarity. Returns the row of each entry int32 [B,G,L]
    (-1: merged into none) and its similarity [B,G,L]."""
    batch, slots, heads = k.shape[:3]
    nearest = torch.full((batch, heads, slots), -1, dtype=torch.int32)
    similarity = torch.zeros((batch, heads, slots), dtype=_compute_dtype(k))
    for b in range(batch):
        end = slots if kv_lens is None else int(kv_lens[b])
        for g in range(heads):
            own = kept[b, g][kept[b, g] >= 0].long()
            to, how = nearest[b, g, :end], similarity[b, g, :end]
            if len(own) and merging != "none":
                units = unit_keys(k[b, :end, g])
                scores = units @ units[own].T
                how.copy_(scores.amax(-1))
                first = torch.where(scores == how[:, None], torch.arange(len(own)), len(own)).amin(-1)
                close = how >= (-torch.inf if least_similarity is None else least_similarity)
                to.copy_(torch.where(close, first, -1))
            to[own] = torch.arange(len(own), dtype=torch.int32)
            how[own] = 1
            for x in (k, v):
                rows = merged_rows(x[b, :end, g], own, to, how, merging)
                x[b, : len(own), g] = rows.to(x.dtype)
    return nearest, similarity
