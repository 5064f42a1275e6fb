"""``sparse_attention``: within its bound on any call, and the laws that tie lists of tokens to dense attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend import NAME
from effops import ops
from effops.reference.bounds import attention_bound, sparse_attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import OUT_OF_RANGE, selections
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]
B, L, H, G = 2, 1500, 4, 2  # several splits


def attend(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.sparse_attention(*tensors, return_lse=True, **options)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, 1, H, 48, dtype=dtype), *(normal(B, L, G, d, dtype=dtype, seed=d) for d in (48, 40))


def some(lists: int, count: int = 200, seed: int = 0, below: int = L) -> Tensor:
    """int32 [B, lists, count], no position twice in a list."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.stack([torch.randperm(below, generator=generator)[:count] for _ in range(lists)])
                        for _ in range(B)]).int()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(selections(DTYPES[dtype]))
    got = attend(*case.tensors, **case.options)
    for bound, x in zip(sparse_attention_bound(*case.tensors, **case.options), got, strict=True):
        assert bound.worst(x) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_positions_are_dense_attention(dtype):
    """Bit for bit where a KV head's rows share a list; a list for each query head within both bounds."""
    q, k, v = inputs(DTYPES[dtype])
    options = {"softcap": 3.0, "sink_logits": normal(H, seed=7)}
    expected = ops.attention(q, k, v, return_lse=True, **options)
    for lists in (1, G):
        every = torch.arange(L, dtype=torch.int32).expand(B, lists, L)
        assert same(attend(q, k, v, every, **options), expected)
    got = attend(q, k, v, torch.arange(L, dtype=torch.int32).expand(B, H, L), **options)
    for bound, a, b in zip(attention_bound(q, k, v, **options), expected, got, strict=True):
        assert bound._replace(value=a.double()).worst(b) <= 2


@pytest.mark.parametrize("lists", [1, G, H])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_is_attention_over_the_gathered_tokens(dtype, lists):
    """Bit for bit: no copy is made of what the list names, and none is needed."""
    q, k, v = inputs(DTYPES[dtype])
    indices = some(lists)
    got = attend(q, k, v, indices)
    for b in range(B):
        for h in range(H):
            group = [h] if lists == H else list(range(h // (H // G) * (H // G), (h // (H // G) + 1) * (H // G)))
            row = indices[b, {1: 0, G: h // (H // G), H: h}[lists]].long()
            keys, values = (x[b : b + 1, row, h // (H // G)][:, :, None] for x in (k, v))
            alone = ops.attention(q[b : b + 1, :, group], keys, values, return_lse=True)
            assert same(tuple(x[:, :, group.index(h)] for x in alone), tuple(x[b : b + 1, :, h] for x in got))


@pytest.mark.parametrize("lists", [1, G, H])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaps_order_and_repetition(dtype, lists):
    """-1 anywhere is nothing (bit for bit on the processor, which closes gaps), another order changes rounding, and a
    list that is written twice has the same mean over twice the mass."""
    q, k, v = inputs(DTYPES[dtype])
    indices = some(lists)
    plain, bounds = attend(q, k, v, indices), sparse_attention_bound(q, k, v, indices)
    assert all(bound.worst(x) <= 1 for bound, x in zip(bounds, plain, strict=True))
    gaps = torch.full((B, lists, 300), -1, dtype=torch.int32)
    gaps[:, :, torch.randperm(300, generator=torch.Generator().manual_seed(1))[:200].sort().values] = indices
    for other in (gaps, indices.flip(-1)):
        got = attend(q, k, v, other)
        assert NAME != "cpu" or other is not gaps or same(got, plain)
        for bound, a, b in zip(bounds, plain, got, strict=True):
            assert bound._replace(value=a.double()).worst(b) <= 2
    out, lse = attend(q, k, v, indices.repeat(1, 1, 2))
    twice = sparse_attention_bound(q, k, v, indices.repeat(1, 1, 2))
    for bound, a, b in zip(twice, (plain[0].double(), plain[1].double() + math.log(2)), (out, lse),
                           strict=True):  # fmt: skip
        assert bound._replace(value=a).worst(b) <= 2


def test_an_exact_mean():
    """Equal scores and small integers leave nothing to round, however often a token is listed."""
    q, k, v = torch.zeros(1, 1, 2, 16), normal(1, 40, 1, 16), normal(1, 40, 1, 8, seed=1).mul(8).round()
    row = [3, 3, 3, 39, -1, 0, 17, 17, 5]
    out, lse = attend(q, k, v, int32(*row).view(1, 1, -1))
    expected = v[0, [j for j in row if j >= 0], 0].sum(0) / 8
    assert same_bits(out, expected.expand_as(out)) and same_bits(lse, torch.full_like(lse, 8).log())


@pytest.mark.parametrize("lists", [1, G, H])
@pytest.mark.parametrize("page", [1, 7, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_dense_cache(dtype, page, lists):
    """Out of pages, wherever they lie; entries and tokens that no list names are never read."""
    q, k, v = inputs(DTYPES[dtype])
    lens, indices = int32(L, 700), some(lists, below=700)
    expected = attend(q, k, v, indices, kv_lens=lens)
    entries = -(-L // page)
    table = torch.randperm(B * entries, generator=torch.Generator().manual_seed(page)).int().view(B, entries)
    pages = []
    for x in (k, v):
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, entries * page - L))
        pages.append(torch.empty(B * entries, page, *x.shape[2:], dtype=x.dtype))
        pages[-1][table.flatten().long()] = padded.view(B * entries, page, *x.shape[2:])
    named = torch.zeros(B, entries, dtype=torch.bool)
    for b in range(B):
        named[b, indices[b].flatten().long() // page] = True
    table[~named] = OUT_OF_RANGE
    assert same(attend(q, *pages, indices, kv_lens=lens, page_table=table), expected)
    a_head = table[:, None].expand(B, G, entries)
    assert same(attend(q, *pages, indices, kv_lens=lens, page_table=a_head), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_a_batch(dtype):
    q, k, v = inputs(DTYPES[dtype])
    indices, lens, starts = some(G, below=690) + 10, int32(L, 700), int32(10, 3)
    got = attend(q, k, v, indices, kv_lens=lens, kv_starts=starts)
    for b in range(B):
        own = slice(b, b + 1)
        alone = attend(q[own], k[own], v[own], indices[own], kv_lens=lens[own], kv_starts=starts[own])
        assert same(alone, tuple(x[own] for x in got))


def test_empty_lists_and_caches():
    q, k, v = inputs(torch.float32)
    for indices in (torch.zeros(B, G, 0, dtype=torch.int32), torch.full((B, G, 5), -1, dtype=torch.int32)):
        for caches in ((k, v), (k[:, :0], v[:, :0])):
            out, lse = attend(q, *caches, indices)
            assert out.eq(0).all() and lse.eq(-torch.inf).all()
            sinks = normal(H)
            out, lse = attend(q, *caches, indices, sink_logits=sinks)
            assert out.eq(0).all() and same_bits(lse, sinks.expand_as(lse))


@pytest.mark.skipif(NAME == "cuda", reason="a GPU checks index values with EFFOPS_CHECK=1 alone")
def test_positions_out_of_range():
    q, k, v = inputs(torch.float32)
    indices = some(H)
    for position, says in ((L, r"\[0, 1500\), got 1500"), (-2, r"\[0, 1500\), got -2")):
        indices[1, 2, 7] = position
        with pytest.raises(
            RuntimeError, match=rf"sparse_attention: indices: expected -1 or .+ {says} at index \[1, 2, 7\]"
        ):
            attend(q, k, v, indices)
    with pytest.raises(RuntimeError, match=r"expected -1 or values in \[4, 9\), got 3 at index \[1, 0, 0\]"):
        attend(q, k, v, int32(8, 3).view(2, 1, 1), kv_lens=int32(9, 9), kv_starts=int32(4, 4))
