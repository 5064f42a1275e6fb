"""``paged_attention``: within its bound on any call, the bits of the dense op, pages and entries that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops
from effops.reference.bounds import paged_attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import OUT_OF_RANGE, paged
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def attend(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.paged_attention(*tensors, return_lse=True, **options)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(paged(DTYPES[dtype]))
    got = attend(*case.tensors, **case.options)
    for bound, x in zip(paged_attention_bound(*case.tensors, **case.options), got, strict=True):
        assert bound.worst(x) <= 1


def in_pages(x: Tensor, page: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [B,L,G,D] cut into pages that lie in a random order, and their table."""
    batch, length = x.shape[:2]
    entries = -(-length // page)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, entries * page - length), value=torch.nan)
    table = torch.randperm(batch * entries, generator=torch.Generator().manual_seed(seed)).int().view(batch, entries)
    pages = torch.empty(batch * entries, page, *x.shape[2:], dtype=x.dtype)
    pages[table.flatten().long()] = padded.view(batch * entries, page, *x.shape[2:])
    return pages, table


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("page", [1, 7, 16, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_dense_op(dtype, page, tokens):
    """Wherever the pages lie and whatever their size; over several splits."""
    q = normal(2, tokens, 4, 48, dtype=DTYPES[dtype])
    k, v = (normal(2, 1300, 2, d, dtype=q.dtype, seed=d) for d in (48, 40))
    lens = int32(1300, 700)
    masks: list[dict[str, Any]] = [{}, {"window": 130, "num_sinks": 9}, {"kv_starts": int32(3, 70), "softcap": 3.0}]
    for options in masks:
        expected = ops.attention(q, k, v, kv_lens=lens, causal=True, return_lse=True, **options)
        for seed in range(sized(2, 1)):
            (k_pages, table), (v_pages, _) = in_pages(k, page, seed), in_pages(v, page, seed)
            assert same(attend(q, k_pages, v_pages, table, lens, causal=True, **options), expected)


def test_heads_of_different_length():
    """A table and a length for each KV head: each head is a call of its own."""
    q, k, v = normal(2, 3, 6, 16), normal(2, 90, 3, 16, seed=1), normal(2, 90, 3, 8, seed=2)
    (k_pages, table), (v_pages, _) = in_pages(k, 8), in_pages(v, 8)
    lens = int32(90, 41, 8, 60, 0, 33).view(2, 3)
    tables = table[:, None].repeat(1, 3, 1)
    got = attend(q, k_pages, v_pages, tables, lens, causal=True)
    for g in range(3):
        heads = slice(2 * g, 2 * g + 2)
        alone = attend(
            q[:, :, heads], k_pages[:, :, g : g + 1], v_pages[:, :, g : g + 1], table, lens[:, g], causal=True
        )
        assert same(alone, tuple(x[:, :, heads] for x in got))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_mixture_is_its_sequences_one_by_one(dtype):
    """A decode step, a prefill chunk, an idle sequence and a whole prompt in one call."""
    q_lens, lens = [1, 40, 0, 17], [130, 90, 20, 17]
    k, v = normal(4, 130, 2, 32, dtype=DTYPES[dtype], seed=1), normal(4, 130, 2, 32, dtype=DTYPES[dtype], seed=2)
    (k_pages, table), (v_pages, _) = in_pages(k, 16), in_pages(v, 16)
    q = normal(sum(q_lens), 4, 32, dtype=DTYPES[dtype])
    offsets = int32(0, *torch.tensor(q_lens).cumsum(0).tolist())
    got = attend(q, k_pages, v_pages, table, int32(*lens), cu_seqlens_q=offsets, causal=True, max_q_len=40)
    for b, n in enumerate(q_lens):
        rows = slice(int(offsets[b]), int(offsets[b]) + n)
        alone = attend(q[None, rows], k_pages, v_pages, table[b : b + 1], int32(lens[b]), causal=True)
        assert same(tuple(x[0] for x in alone), tuple(x[rows] for x in got))


def test_entries_below_a_window_are_not_read():
    k, v = normal(1, 200, 1, 16, seed=1), normal(1, 200, 1, 16, seed=2)
    (k_pages, table), (v_pages, _) = in_pages(k, 16), in_pages(v, 16)
    call = {"window": 30, "num_sinks": 5, "causal": True}
    expected = attend(normal(1, 2, 1, 16), k_pages, v_pages, table, int32(200), **call)
    freed = table.clone()
    freed[0, 1:10] = OUT_OF_RANGE
    assert same(attend(normal(1, 2, 1, 16), k_pages, v_pages, freed, int32(200), **call), expected)
    freed[0, 10] = -1
    with pytest.raises(
        RuntimeError, match=r"paged_attention: page_table: expected pages in \[0, 13\), got -1 at .+ 10"
    ):
        attend(normal(1, 2, 1, 16), k_pages, v_pages, freed, int32(200), **call)


def test_no_pages():
    empty = torch.zeros(0, 16, 2, 8)
    for table in (torch.zeros(2, 0, dtype=torch.int32), torch.full((2, 3), -1, dtype=torch.int32)):
        out, lse = attend(normal(2, 3, 4, 8), empty, empty, table, int32(0, 0))
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
