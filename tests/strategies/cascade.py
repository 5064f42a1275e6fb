"""Calls of ``cascade_attention``: trees of prefixes, dense and paged levels, causal and tree masks in the last."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from effops.ops import KVLevel
from hypothesis import strategies as st
from torch import Tensor

from strategies.attention import DIMS, GROUPS, offsets, score_options
from strategies.cached import PAGES, layouts, pages_of, tables
from strategies.values import KINDS, int32, values


class CascadeCase(NamedTuple):
    q: Tensor
    levels: list[KVLevel]
    options: dict[str, Any]


@st.composite
def groupings(draw: st.DrawFn, rows: int) -> list[int]:
    """Rows of the groups of a level, some of none; all rows or fewer."""
    sizes = []
    left = rows
    for _ in range(draw(st.integers(1, 4))):
        sizes.append(draw(st.sampled_from((0, 1, 2, left // 2, left))))
        sizes[-1] = min(sizes[-1], left)
        left -= sizes[-1]
    return [*sizes, left] if draw(st.booleans()) else sizes


@st.composite
def cascades(draw: st.DrawFn, dtype: torch.dtype, *, kinds: tuple[str, ...] = KINDS) -> CascadeCase:
    rows = draw(st.sampled_from((0, 1, 3, 8, 20, 50)))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    dim, v_dim, seed, kind = (draw(st.sampled_from(x)) for x in (DIMS, DIMS, range(100), kinds))
    count = draw(st.integers(1, 4))
    mask = draw(st.sampled_from(("none", "causal", "tree")))
    levels = []
    for i in range(count):
        sizes = draw(groupings(rows))
        least = sizes if mask == "tree" and i == count - 1 else [0] * len(sizes)
        lens = [n + draw(st.sampled_from((0, 1, 3, 64, 65, 150))) for n in least]
        how = {"dtype": dtype, "kind": kind, "seed": seed + 7 * i}
        if draw(st.booleans()):
            page = draw(st.sampled_from(PAGES))
            nested, starts = [[n] for n in lens], [0] * len(lens)
            table, pages = draw(tables(nested, starts, page))
            k, v = (pages_of(table, nested, starts, page, pages, kv_heads, d, **how) for d in (dim, v_dim))
        else:
            table = None
            capacity = max(lens) + draw(st.integers(0, 2))
            k, v = (values(len(lens), capacity, kv_heads, d, **how) for d in (dim, v_dim))
            for b, length in enumerate(lens):
                k[b, length:], v[b, length:] = torch.nan, torch.nan
        place = draw(layouts)
        levels.append(KVLevel(place(k), place(v), int32(*lens), offsets(sizes), table))
    options: dict[str, Any] = draw(score_options(kv_heads * group))
    if mask == "causal":
        options["causal"] = True
    elif mask == "tree":
        tokens = max(sizes) + draw(st.integers(0, 2))
        generator = torch.Generator().manual_seed(seed)
        shape = (draw(st.sampled_from((1, len(sizes)))), tokens, -(-tokens // 64))
        options["ancestors"] = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    q = values(rows, kv_heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    return CascadeCase(draw(layouts)(q), levels, options)
