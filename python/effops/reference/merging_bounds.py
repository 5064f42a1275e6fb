"""How far correctly merged keys and values may lie from the exact ones, and their similarities; notation as in
:mod:`effops.reference.bounds`."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference.bounds import FLUSH, ROUNDOFF, Interval, _chain, _compute_roundoff, _interval, _smallest
from effops.reference.merging import merged_rows, unit_keys


def similarity_bound(k: Tensor) -> Interval:
    """The similarities of all entries [B,G,L,L] of k [B,L,G,D]; norms are 0 or normal numbers of the compute type.

    A number over the largest of its key rounds once, its square thrice in all; D of them add up, their root halves that
    and rounds, as do the product with the largest number and the division: a unit vector's numbers are off by
    ``g(D + 8)``. The product of two has D terms, whose sizes add up to at most 1.
    """
    w, dim = _compute_roundoff(k.dtype), k.shape[-1]
    units = unit_keys(k.detach().double()).transpose(1, 2)
    value = units @ units.transpose(-1, -2)
    error = _chain(3 * dim + 20, w) + 2 * dim * FLUSH
    return _interval(value, torch.full_like(value, error), k.dtype)


def merge_kv_bound(
    x: Tensor,
    kept: Tensor,
    nearest: Tensor,
    similarity: Tensor,
    *,
    kv_lens: Tensor | None = None,
    merging: str = "pivotal",
) -> Interval:
    """What ``merge_kv`` makes of the keys or the values x [B,L,G,D], itself not written, given the assignment that it
    returned: the rows [B,N,G,D] of the entries kept [B,G,N], zeros for -1.

    With n entries merged into one, each part rounds twice at most before n of them add up, the sum is divided and added
    to the row (g(n + 4) of the sum of sizes, over n + 1), which rounds in the compute type and then to the dtype; a row
    of itself alone is a copy.
    """
    u, w = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    batch, _, heads, dim = x.shape
    value = x.new_zeros(batch, kept.shape[2], heads, dim, dtype=torch.float64)
    error = torch.zeros_like(value)
    for b in range(batch):
        end = x.shape[1] if kv_lens is None else int(kv_lens[b])
        for g in range(heads):
            own = kept[b, g][kept[b, g] >= 0].long()
            to, how, rows = nearest[b, g, :end], similarity[b, g, :end].double(), x[b, :end, g].detach().double()
            exact = merged_rows(rows, own, to, how, merging)
            value[b, : len(own), g] = exact
            for i, entry in enumerate(own.tolist()):
                others = (to == i) & (torch.arange(end) != entry)
                n = int(others.sum())
                if n == 0:
                    continue
                weights = how[others].abs()[:, None] if merging == "weighted" else 1.0
                sizes = (weights * rows[others].abs()).sum(0) + n * rows[entry].abs()
                off = _chain(n + 4, w) * sizes / (n + 1) + (n + 2) * FLUSH
                off = off + w * (exact[i].abs() + off)
                error[b, i, g] = off + u * (exact[i].abs() + off) + _smallest(x.dtype)
    return _interval(value, error, x.dtype)
