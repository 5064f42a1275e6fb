"""Calls of ``paged_attention``, ``tree_attention`` and ``sparse_attention``: page tables, trees, lists of tokens,
ragged batches, over dense or paged caches."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies.attention import DIMS, GROUPS, Case, mask_options, offsets, score_options
from strategies.layouts import LAYOUTS
from strategies.values import KINDS, int32, values

PAGES = (1, 2, 3, 8, 16, 17, 64, 100)
LENGTHS = (0, 1, 3, 16, 33, 63, 64, 65, 129, 150, 300)
TOKENS = (1, 1, 2, 3, 5, 8, 17, 33, 66)
OUT_OF_RANGE = 2**31 - 1

layouts = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)


@st.composite
def tables(draw: st.DrawFn, lens: list[list[int]], starts: list[int], page: int) -> tuple[Tensor, int]:
    """int32 [B,G,entries] for lengths [B][G], or [B,entries] for [B][1], and the number of pages: no page twice,
    entries that no key needs hold nonsense."""
    entries = max([-(-n // page) for row in lens for n in row], default=0) + draw(st.integers(0, 2))
    needed = [
        [range(min(start, n) // page, -(-n // page)) for n in row] for row, start in zip(lens, starts, strict=True)
    ]
    count = sum(len(r) for row in needed for r in row)
    free = draw(st.integers(0, 2))
    order = torch.randperm(count + free, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).tolist()
    rows = [[[order.pop() if i in r else OUT_OF_RANGE for i in range(entries)] for r in row] for row in needed]
    heads = len(lens[0]) if lens else 1
    table = torch.tensor(rows, dtype=torch.int32).view(len(lens), heads, entries)
    return (table if heads > 1 else table[:, 0]), count + free


def pages_of(
    table: Tensor, lens: list[list[int]], starts: list[int], page: int, count: int, heads: int, dim: int, **how: Any
) -> Tensor:
    """Pages [count, page, heads, dim] with NaN wherever no sequence has a key."""
    pages = values(count, page, heads, dim, **how)
    exists = torch.zeros(count, page, heads, dtype=torch.bool)
    for b, (row, start) in enumerate(zip(lens, starts, strict=True)):
        for g in range(heads):
            own = row[g % len(row)]
            entries = table[b] if table.dim() == 2 else table[b, g]
            for j in range(min(start, own), own):
                exists[int(entries[j // page]), j % page, g] = True
    pages[~exists] = torch.nan
    return pages


@st.composite
def paged(draw: st.DrawFn, dtype: torch.dtype, *, kinds: tuple[str, ...] = KINDS) -> Case:
    """A call of ``paged_attention``: equal or ragged new tokens, one page table a sequence or one a KV head."""
    batch, page = draw(st.integers(0, 3)), draw(st.sampled_from(PAGES))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    a_head = kv_heads > 1 and batch > 0 and draw(st.booleans())
    lens = [[draw(st.sampled_from(LENGTHS)) for _ in range(kv_heads if a_head else 1)] for _ in range(batch)]
    with_starts = draw(st.booleans())
    starts = [draw(st.integers(0, min(row))) if with_starts else 0 for row in lens]
    table, count = draw(tables(lens, starts, page))
    dim, v_dim, seed, kind = (draw(st.sampled_from(x)) for x in (DIMS, DIMS, range(100), kinds))
    k, v = (pages_of(table, lens, starts, page, count, kv_heads, d, dtype=dtype, seed=seed + d, kind=kind)
            for d in (dim, v_dim))  # fmt: skip
    options = draw(mask_options(batch, kv_heads, table.shape[-1] * page)) | draw(score_options(kv_heads * group))
    if with_starts:
        options["kv_starts"] = int32(*starts)
    if draw(st.booleans()):
        q_lens, spare = [draw(st.sampled_from((0, 1, 2, 5, 18))) for _ in range(batch)], draw(st.sampled_from((0, 3)))
        q = values(sum(q_lens) + spare, kv_heads * group, dim, dtype=dtype, seed=seed, kind=kind)
        options["cu_seqlens_q"] = offsets(q_lens)
    else:
        tokens = draw(st.sampled_from((1, 2, 5, 18, 0)))
        q = values(batch, tokens, kv_heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    kv_lens = torch.tensor(lens, dtype=torch.int32).view(batch, kv_heads) if a_head else int32(*(n for (n,) in lens))
    return Case((draw(layouts)(q), draw(layouts)(k), draw(layouts)(v), draw(layouts)(table), kv_lens), options)


def random_parents(tokens: int, seed: int) -> list[int]:
    """Parents of a random tree, as bushy as long."""
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [int(torch.randint(max(0, i - 4), i, (), generator=generator)) for i in range(1, tokens)]


def ancestor_bits(parents: list[int]) -> Tensor:
    """int64 [T, ceil(T/64)]: each node's ancestors and itself."""
    words = torch.zeros(len(parents), -(-len(parents) // 64), dtype=torch.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            words[i] = words[parent]
        words[i, i >> 6] |= (1 << (i & 63)) - ((1 << 64) if i & 63 == 63 else 0)
    return words


@st.composite
def trees(draw: st.DrawFn, dtype: torch.dtype, *, kinds: tuple[str, ...] = KINDS) -> Case:
    """A call of ``tree_attention``: trees and arbitrary masks, ragged or not, over a dense or a paged cache."""
    batch, tokens = draw(st.sampled_from((1, 2, 3, 0))), draw(st.sampled_from(TOKENS))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    q_lens = [tokens] * batch
    ragged = draw(st.booleans())
    if ragged:
        q_lens = [draw(st.integers(0, tokens)) for _ in range(batch)]
    lens = [[draw(st.sampled_from((0, n, n + 1, n + 30, n + 140)))] for n in q_lens]
    with_starts = draw(st.booleans())
    starts = [draw(st.integers(0, row[0])) if with_starts else 0 for row in lens]
    dim, v_dim, seed, kind = (draw(st.sampled_from(x)) for x in (DIMS, DIMS, range(100), kinds))
    options: dict[str, Any] = draw(mask_options(batch, kv_heads, 170)) | draw(score_options(kv_heads * group))
    for name in ("causal", "prefix_lens"):
        options.pop(name, None)
    how = {"dtype": dtype, "kind": kind}
    if draw(st.booleans()):
        page = draw(st.sampled_from(PAGES))
        table, count = draw(tables(lens, starts, page))
        k, v = (pages_of(table, lens, starts, page, count, kv_heads, d, seed=seed + d, **how) for d in (dim, v_dim))
        options["page_table"] = draw(layouts)(table)
    else:
        capacity = max((row[0] for row in lens), default=0) + draw(st.integers(0, 3))
        k, v = (values(batch, capacity, kv_heads, d, seed=seed + d, **how) for d in (dim, v_dim))
        for b, (row, start) in enumerate(zip(lens, starts, strict=True)):
            for x in (k, v):
                x[b, row[0] :], x[b, :start] = torch.nan, torch.nan
    options["kv_lens"] = int32(*(row[0] for row in lens))
    if with_starts:
        options["kv_starts"] = int32(*starts)
    one = batch != 1 and draw(st.booleans())
    rows = 1 if one else batch
    if draw(st.booleans()):
        bits = torch.stack([ancestor_bits(random_parents(tokens, seed + b)) for b in range(rows)]) if rows else None
        bits = torch.zeros(0, tokens, -(-tokens // 64), dtype=torch.int64) if bits is None else bits
    else:
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(-(2**63), 2**63 - 1, (rows, tokens, -(-tokens // 64)), generator=generator)
    if draw(st.booleans()):
        depths = torch.randint(-2, tokens + 3, (1 if draw(st.booleans()) else batch, tokens),
                               generator=torch.Generator().manual_seed(seed))  # fmt: skip
        options["depths"] = draw(layouts)(depths.int())
    if ragged:
        spare = draw(st.sampled_from((0, 3)))
        q = values(sum(q_lens) + spare, kv_heads * group, dim, seed=seed, **how)
        options["cu_seqlens_q"] = offsets(q_lens)
    else:
        q = values(batch, tokens, kv_heads * group, dim, seed=seed, **how)
    return Case((draw(layouts)(q), draw(layouts)(k), draw(layouts)(v), draw(layouts)(bits)), options)


@st.composite
def selections(draw: st.DrawFn, dtype: torch.dtype, *, kinds: tuple[str, ...] = KINDS) -> Case:
    """A call of ``sparse_attention``: lists for all heads, KV heads or query heads, with gaps and repetitions. Tokens
    that no list names hold NaN."""
    batch, page = draw(st.integers(0, 3)), draw(st.sampled_from(PAGES))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    heads = kv_heads * group
    lens = [draw(st.sampled_from(LENGTHS)) for _ in range(batch)]
    starts = [draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in lens]
    lists, count = draw(st.sampled_from((1, kv_heads, heads))), draw(st.sampled_from((0, 1, 3, 16, 64, 65, 130)))
    dim, v_dim, seed, kind = (draw(st.sampled_from(x)) for x in (DIMS, DIMS, range(100), kinds))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((batch, lists, count), -1, dtype=torch.int32)
    for b, (length, start) in enumerate(zip(lens, starts, strict=True)):
        if start < length:
            drawn = torch.randint(start, length, (lists, count), generator=generator, dtype=torch.int32)
            gaps = torch.rand(lists, count, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
            indices[b] = torch.where(gaps, -1, drawn)
    options: dict[str, Any] = draw(score_options(heads)) | {"kv_lens": int32(*lens)}
    if any(starts) or draw(st.booleans()):
        options["kv_starts"] = int32(*starts)
    how = {"dtype": dtype, "kind": kind}
    capacity = max(lens, default=0) + draw(st.integers(0, 3))
    caches = [values(batch, capacity, kv_heads, d, seed=seed + d, **how) for d in (dim, v_dim)]
    named = torch.zeros(batch, capacity, kv_heads, dtype=torch.bool)
    for b in range(batch):
        for g in range(kv_heads):
            own = (
                slice(None)
                if lists == 1
                else slice(g, g + 1)
                if lists == kv_heads
                else slice(g * group, (g + 1) * group)
            )
            used = indices[b, own].flatten().long()
            named[b, used[used >= 0], g] = True
    for x in caches:
        x[~named] = torch.nan
    if draw(st.booleans()):
        table, pages = draw(tables([[n] for n in lens], starts, page))
        paged = [torch.full((pages, page, kv_heads, d), torch.nan, dtype=dtype) for d in (dim, v_dim)]
        for b, (length, start) in enumerate(zip(lens, starts, strict=True)):
            for j in range(start, length):
                for to, x in zip(paged, caches, strict=True):
                    to[int(table[b, j // page]), j % page] = x[b, j]
        caches, options["page_table"] = paged, draw(layouts)(table)
    q = values(batch, 1, heads, dim, seed=seed, **how)
    return Case((draw(layouts)(q), *(draw(layouts)(x) for x in caches), draw(layouts)(indices)), options)
