"""Attention mass, and the cache that evicts by it."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference.attention import _compute_dtype, _per_sequence, allowed_keys
from effops.reference.cache import _unpaged


def existing_keys(k: Tensor, exists: Tensor, page_table: Tensor | None) -> Tensor:
    """[B,L,G,D] of k, or of its pages, with zeros where exists bool [B,L] says that there is no key."""
    if page_table is not None:
        pages, (batch, capacity) = k, exists.shape
        k = k.new_zeros(batch, capacity, *k.shape[2:])
        for b in range(batch):
            there = exists[b].nonzero().flatten()
            if len(there):
                start, end = int(there[0]), int(there[-1]) + 1
                for g in range(k.shape[2]):
                    keys, _ = _unpaged(pages, pages, page_table, b, g, end, start)
                    k[b, :end, g] = keys[0, :, 0]
    return torch.where(exists[:, :, None, None], k, 0)


def accumulate_mass(
    mass: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    num_sinks: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    page_table: Tensor | None = None,
) -> None:
    """Adds in place to mass [B,G,L] the weights exp(s - lse) of every allowed key, summed over the T query rows and the
    query heads of its KV head: s as in ``attention`` of q [B,T,H,D] over k [B,L,G,D], or pages [P,page,G,D] whose
    tokens page_table int32 [B,entries] or [B,G,entries] places; lse [B,T,H], rows of -inf add nothing."""
    batch, tokens, heads, dim = q.shape
    kv_heads, capacity = mass.shape[1:]
    dtype = _compute_dtype(q)
    ends = _per_sequence(kv_lens, capacity, batch, q.device)
    starts = _per_sequence(kv_starts, 0, batch, q.device)
    windows = torch.tensor([window], device=q.device) if window else None
    allowed = allowed_keys(
        tokens, capacity, ends, kv_starts=starts, causal=causal, windows=windows, num_sinks=num_sinks
    )
    j = torch.arange(capacity, device=q.device)
    exists = (starts[:, None] <= j) & (j < ends[:, None])
    keys = existing_keys(k.to(dtype), exists, page_table)
    rows = q.to(dtype).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("btgrd,blgd->bgrtl", rows, keys) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    base = lse.to(dtype).unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1)[..., None]
    counts = allowed[:, :, None] & (base != -torch.inf)
    weights = torch.where(counts, (scores - torch.where(base == -torch.inf, 0.0, base)).exp(), 0.0)
    sums = weights.sum((2, 3))
    mass.copy_(torch.where(exists[:, None], mass + sums, mass))


def append_evicting(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    positions: Tensor,
    new_positions: Tensor,
    *,
    recent: int,
    num_sinks: int = 0,
) -> None:
    """Writes in place the tokens k [B,T,G,D], v [B,T,G,Dv] at new_positions int32 [B,T] (-1 skips), one after the
    other, into k_cache [B,L,G,D], v_cache [B,L,G,Dv], whose slots hold tokens positions int32 [B,G,L] (negative: free)
    of mass [B,G,L]: each into its KV head's first free slot, else into that of the entry with the least mass, of equals
    the oldest, with ``num_sinks <= position <= new - recent``. A NaN is infinite; a new entry's mass is 0."""
    batch, kv_heads, slots = positions.shape
    for b in range(batch):
        for t, new in enumerate(new_positions[b].tolist()):
            if new < 0:
                continue
            for g in range(kv_heads):
                held = positions[b, g].tolist()
                weights = mass[b, g].nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist()
                free = [j for j in range(slots) if held[j] < 0]
                others = [j for j in range(slots) if num_sinks <= held[j] <= new - recent]
                if not free and not others:
                    raise RuntimeError(
                        "append_evicting: positions: expected a free slot or an entry that may be evicted, got none"
                    )
                slot = free[0] if free else min(others, key=lambda j: (weights[j], held[j], j))
                k_cache[b, slot, g], v_cache[b, slot, g] = k[b, t, g], v[b, t, g]
                mass[b, g, slot], positions[b, g, slot] = 0, new
