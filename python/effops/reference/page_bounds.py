"""Bounds of pages, and the tokens that they select."""

from __future__ import annotations

import torch
from torch import Tensor

BOUND_SUMS = 32


def append_page_bounds(low: Tensor, high: Tensor, k: Tensor, slots: Tensor, page: int) -> None:
    """Widens low and high [B,P,G,D] in place by k [B,T,G,D] at slots int32 [B,T], one token after the other; -1 skips,
    and the token in the first place of a page begins it anew."""
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            if slot < 0:
                continue
            key, at = k[b, t], (b, slot // page)
            anew = slot % page == 0
            low[at] = key if anew else torch.minimum(low[at], key)
            high[at] = key if anew else torch.maximum(high[at], key)


def page_upper_bounds(q: Tensor, low: Tensor, high: Tensor, *, each_head: bool = False) -> Tensor:
    """float32 [B, G or H, P]: by what ``page_topk`` orders the pages of each list, sum over channels of
    max(q low, q high). Channel c is added to number c % 32 of 32 sums, and these by halves."""
    kv_heads, dim = low.shape[2:]
    x = q[:, 0].float().unflatten(1, (kv_heads, q.shape[2] // kv_heads))[:, :, :, None]  # [B,G,R,1,D]
    low, high = (t.float().transpose(1, 2)[:, :, None] for t in (low, high))  # [B,G,1,P,D]
    parts = torch.maximum(x * low, x * high)
    sums = parts.new_zeros(*parts.shape[:-1], BOUND_SUMS)
    for first in range(0, dim, BOUND_SUMS):
        part = parts[..., first : first + BOUND_SUMS]
        sums = sums + torch.nn.functional.pad(part, (0, BOUND_SUMS - part.shape[-1]))
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    bounds = sums[..., 0]
    return bounds.flatten(1, 2) if each_head else bounds.amax(2)


def page_topk(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    pages: int,
    page: int,
    *,
    kv_lens: Tensor | None = None,
    num_sinks: int = 0,
    window: int = 0,
    each_head: bool = False,
) -> Tensor:
    """int32 [B, G or H, pages * page]: the tokens of the pages that hold one of the first ``num_sinks`` or the last
    ``window`` tokens, and of the other pages those with the largest ``page_upper_bounds``, of equals the lowest;
    ascending, -1 after the last."""
    bounds = page_upper_bounds(q, low, high, each_head=each_head)
    batch, lists, capacity = bounds.shape
    indices = torch.full((batch, lists, pages * page), -1, dtype=torch.int32, device=q.device)
    for b in range(batch):
        length = capacity * page if kv_lens is None else int(kv_lens[b])
        forced = {t // page for t in (*range(min(num_sinks, length)), *range(max(0, length - window), length))}
        for i in range(lists):
            order = bounds[b, i, : -(-length // page)].argsort(descending=True, stable=True).tolist()
            free = [j for j in order if j not in forced][: pages - len(forced)]
            tokens = [j * page + k for j in sorted(forced.union(free)) for k in range(page)]
            chosen = torch.tensor([t for t in tokens if t < length], dtype=torch.int32)
            indices[b, i, : len(chosen)] = chosen
    return indices
