"""Attention over a tree of shared prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.reference.attention import masked_attention
from effops.reference.cache import _empty_result, gather_pages, tree_mask


def level_keys(level: Any, group: int) -> tuple[Tensor, Tensor]:
    """The keys and values [n, G, D] of one group of a level: (k, v, lens, group_indptr, page_table or None)."""
    k, v, lens, _, page_table = level
    length = int(lens[group])
    if page_table is None:
        return k[group, :length], v[group, :length]
    return gather_pages(k, page_table[group], length), gather_pages(v, page_table[group], length)


def cascade_attention(
    q: Tensor,
    levels: Sequence[Any],
    *,
    causal: bool = False,
    ancestors: Tensor | None = None,
    depths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each row of q [N,H,D] attends to the concatenation of its group's keys of every level: (k [g,L,G,D] or pages
    [P,page,G,D], v, lens int32 [g], group_indptr int32 [g + 1], page_table int32 [g,entries] or None).

    In the last level row i of a group of T rows and n keys sees keys up to ``n - T + i`` if causal; with ``ancestors``
    int64 [g or 1, T, ceil(T/64)] all but the last T keys, and of those the ones whose bit it has. ``depths`` say where
    tree rows stand, which matters to windows alone; here there are none. Sinks count for the rows of its groups.
    """
    out, lse = _empty_result(q, levels[0][1])
    groups = [_groups(level[3]) for level in levels]
    for row in range(q.shape[0]):
        own = [(level, *rows[row]) for level, rows in zip(levels, groups, strict=True) if row in rows]
        if not own:
            continue
        parts = [level_keys(level, group) for level, group, _, _ in own]
        keys, values = (torch.cat(x)[None] for x in zip(*parts, strict=True))
        allowed = torch.ones(keys.shape[1], dtype=torch.bool, device=q.device)
        last = row in groups[-1]
        if last:
            _, group, i, count = own[-1]
            total, length = keys.shape[1], parts[-1][0].shape[0]
            mine = allowed[total - length :]
            if causal:
                mine[max(length - count + i + 1, 0) :] = False
            elif ancestors is not None and length:
                bits = tree_mask(ancestors[group if ancestors.shape[0] > 1 else 0])
                mine[length - count :] &= bits[i, :count]
        sinks = sink_logits if last else None
        part = masked_attention(
            q[None, row : row + 1], keys, values, allowed[None, None, None], torch.ones_like(allowed)[None],
            sink_logits=sinks, softcap=softcap, scale=scale,
        )  # fmt: skip
        out[row], lse[row] = part[0][0, 0], part[1][0, 0]
    return (out, lse) if return_lse else out


def _groups(offsets: Tensor) -> dict[int, tuple[int, int, int]]:
    """Of each row its group, its place there and the group's size."""
    pairs = enumerate(itertools.pairwise(offsets.tolist()))
    return {row: (i, row - begin, end - begin) for i, (begin, end) in pairs for row in range(begin, end)}
