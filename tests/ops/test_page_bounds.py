"""``append_page_bounds`` and ``page_topk``: exact, for bounds are float32 sums in one order everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.reference.page_bounds import BOUND_SUMS
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS, embed, memory
from strategies.values import DTYPES, KINDS, int32, normal, values
from torch import Tensor

pytestmark = pytest.mark.core

PLACES = st.sampled_from([*LAYOUTS.values(), lambda x: embed(x, [0, 2, 3, 1], before=1, behind=3)])
STEP, EXP = 2.0**-24, 2.0**-126


def counted(batch: int, tokens: int) -> Tensor:
    return torch.arange(tokens, dtype=torch.int32).expand(batch, tokens)


def bounds_of(k: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Those of keys [B,L,G,D] that were appended in one call."""
    shape = (k.shape[0], -(-k.shape[1] // page), *k.shape[2:])
    low, high = (torch.full(shape, torch.nan, dtype=k.dtype) for _ in range(2))
    ops.append_page_bounds(low, high, k, counted(*k.shape[:2]), page)
    return low, high


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_append(dtype, data):
    """Against the reference, in all of the memory: other pages and gaps stay as they are."""
    batch, tokens, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9)), data.draw(st.integers(0, 3))
    dim, pages, page = (data.draw(st.sampled_from(x)) for x in ((0, 1, 5, 16, 40), (1, 3, 8), (1, 2, 5)))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(("normal", "spikes", "large")))
    one = st.integers(-1, pages * page - 1)
    slots = int32(*data.draw(st.lists(one, min_size=batch * tokens, max_size=batch * tokens))).view(batch, tokens)
    k = values(batch, tokens, heads, dim, dtype=DTYPES[dtype], seed=seed, kind=kind)
    if data.draw(st.booleans()) and k.numel():
        k.view(-1)[seed % k.numel()] = data.draw(st.sampled_from((torch.inf, -torch.inf)))
    before = values(2, batch, pages, heads, dim, dtype=DTYPES[dtype], seed=seed + 1)
    place, other = data.draw(PLACES), data.draw(PLACES)
    got, expected = ([place(before[0]), other(before[1])] for _ in range(2))
    ops.append_page_bounds(*got, data.draw(PLACES)(k), slots, page)
    reference.append_page_bounds(*expected, k, slots, page)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(memory(a), memory(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_a_prompt(dtype):
    """The least and the largest of each page's keys, of the last page's few, too; from the next token on anew."""
    k = normal(2, sized(2000, 150), 3, 40, dtype=DTYPES[dtype])
    low, high = bounds_of(k, 16)
    for j in range(low.shape[1]):
        keys = k[:, 16 * j : 16 * j + 16]
        assert torch.equal(low[:, j], keys.amin(1)) and torch.equal(high[:, j], keys.amax(1))
    ops.append_page_bounds(low, high, k[:, :1] * 0, int32(0, -1)[:, None], 16)
    assert low[0, 0].count_nonzero() == high[0, 0].count_nonzero() == 0
    assert torch.equal(low[1, 0], k[1, :16].amin(0))


def search(data: Any, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor, int, int], dict[str, Any]]:
    batch, heads, group = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dim = data.draw(st.sampled_from((0, 1, 8, 31, 32, 33, 64, 100, 130)))
    capacity = data.draw(st.sampled_from((0, 1, 15, 16, 33, 64, 100, sized(700, 90), sized(2600, 130))))
    page, seed, kind = (data.draw(x) for x in (st.sampled_from((1, 3, 16)), st.integers(0, 99), st.sampled_from(KINDS)))
    sinks, window = data.draw(st.sampled_from((0, 1, 4))), data.draw(st.sampled_from((0, 1, 2, 8, 17)))
    forced = -(-sinks // page) + (-(-(window - 1) // page) + 1 if window else 0)
    pages = forced + data.draw(st.sampled_from((0, 1, 7, 40, 200)))
    options: dict[str, Any] = {"num_sinks": sinks, "window": window, "each_head": data.draw(st.booleans())}
    q = values(batch, 1, heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    low, high = (values(batch, capacity, heads, dim, dtype=dtype, seed=seed + i, kind=kind) for i in (1, 2))
    if data.draw(st.booleans()):
        lens = [data.draw(st.integers(0, capacity * page)) for _ in range(batch)]
        options["kv_lens"] = int32(*lens)
        for b, length in enumerate(lens):
            low[b, -(-length // page) :] = high[b, -(-length // page) :] = torch.nan  # never read
    return (q, low, high, pages, page), options


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    (q, *bounds, pages, page), options = search(data, DTYPES[dtype])
    got = ops.page_topk(data.draw(PLACES)(q), *(data.draw(PLACES)(x) for x in bounds), pages, page, **options)
    assert torch.equal(got, reference.page_topk(q, *bounds, pages, page, **options))


@given(data=st.data())
def test_the_reference_is_near_the_formula(data):
    """By the rounding of a product, and of the sums that it goes through: of its channels, then five halves."""
    (q, low, high, _, _), _ = search(data, torch.float32)
    heads = reference.page_upper_bounds(q, low, high, each_head=True)
    group = q.shape[2] // low.shape[2]
    lists = reference.page_upper_bounds(q, low, high)
    assert torch.equal(lists.nan_to_num(7), heads.unflatten(1, (-1, group)).amax(2).nan_to_num(7))
    x = q[:, 0, :, None].double()
    low, high = (t.double().transpose(1, 2).repeat_interleave(group, 1) for t in (low, high))
    parts = torch.maximum(x * low, x * high)
    bound = (q.shape[3] / BOUND_SUMS + 7) * STEP * parts.abs().sum(-1) + 200 * EXP * STEP
    error = (heads.double() - parts.sum(-1)).abs() / bound
    assert error.numel() == 0 or error.nan_to_num(0).max() <= 1


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_token_scores_above_its_page(dtype, page):
    """Not by one bit, for rounding keeps order; a page of one token has its score."""
    q, k = normal(2, 1, 6, 72, dtype=DTYPES[dtype]), normal(2, 203, 3, 72, dtype=DTYPES[dtype], seed=1)
    bounds = reference.page_upper_bounds(q, *bounds_of(k, page), each_head=True)
    scores = reference.page_upper_bounds(q, k, k, each_head=True)
    above = bounds.repeat_interleave(page, -1)[..., : k.shape[1]] - scores
    assert above.min() >= 0 and (above.max() > 0) == (page > 1)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("each_head", [False, True])
def test_pages_of_one_token(dtype, each_head):
    """The tokens of the largest scores, as all channels as labels find them; multiples of 1/4 have exact scores."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-8, 9, s, generator=generator) / 4 for s in ((2, 1, 6, 40), (2, sized(3000, 300), 3, 40)))
    q, k = q.to(DTYPES[dtype]), k.to(DTYPES[dtype])
    options: dict[str, Any] = {"num_sinks": 3, "window": 5, "each_head": each_head, "kv_lens": int32(k.shape[1], 280)}
    channels = torch.arange(40, dtype=torch.int32).expand(3, 40)
    expected = ops.label_topk(q, k, channels, 200, **options)
    assert torch.equal(ops.page_topk(q, k, k, 200, 1, **options), expected)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_all_pages_are_all_tokens(dtype):
    """And any number of pages is whole ones, cut off where a sequence ends."""
    q, k = normal(2, 1, 4, 32, dtype=DTYPES[dtype]), normal(2, 150, 2, 32, dtype=DTYPES[dtype], seed=1)
    bounds, lens = bounds_of(k, 16), int32(150, 37)
    every = ops.page_topk(q, *bounds, 10, 16, kv_lens=lens)
    assert torch.equal(every[0], torch.arange(160).where(torch.arange(160) < 150, -1).int().expand(2, 160))
    assert torch.equal(every[1], torch.arange(160).where(torch.arange(160) < 37, -1).int().expand(2, 160))
    few = ops.page_topk(q, *bounds, 2, 16, kv_lens=lens, window=1)
    for length, lists in zip(lens.tolist(), few, strict=True):
        for row in lists.tolist():
            tokens, last = [t for t in row if t >= 0], length // 16 * 16
            assert tokens[16:] == list(range(last, length)) and tokens[:16] == list(range(tokens[0], tokens[0] + 16))
            assert tokens[0] % 16 == 0 and row[len(tokens) :] == [-1] * (32 - len(tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_threads_and_lists(dtype):
    """A sequence's list does not depend on others, nor on threads; one head's own list is that of a KV head alone."""
    q, k = normal(3, 1, 4, 48, dtype=DTYPES[dtype]), normal(3, sized(5000, 300), 4, 48, dtype=DTYPES[dtype], seed=1)
    bounds = bounds_of(k, 4)
    got = ops.page_topk(q, *bounds, 9, 4)
    assert torch.equal(ops.page_topk(q, *bounds, 9, 4, each_head=True), got)
    for b in range(3):
        assert torch.equal(ops.page_topk(q[b : b + 1], *(x[b : b + 1] for x in bounds), 9, 4)[0], got[b])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.page_topk(q, *bounds, 9, 4), got)
    finally:
        torch.set_num_threads(threads)


def test_permuted_channels_within_their_sums():
    """Channels that stay in their sum's order, and swapped halves of all sums: the same bits, the same lists."""
    q, k = normal(2, 1, 4, 64), normal(2, 400, 2, 64, seed=1)
    bounds, order = bounds_of(k, 4), torch.arange(64).view(2, 2, 16).flip(1).flatten()
    moved = [x[..., order] for x in (q, *bounds)]
    assert torch.equal(reference.page_upper_bounds(*moved), reference.page_upper_bounds(q, *bounds))
    assert torch.equal(ops.page_topk(*moved, 9, 4), ops.page_topk(q, *bounds, 9, 4))


def test_not_numbers():
    """A query that is not finite gives some list of pages that are there, without repetition."""
    q, k = normal(1, 1, 2, 16), normal(1, 300, 1, 16, seed=1)
    for value in (torch.nan, torch.inf, -torch.inf):
        q[0, 0, 1, 3] = value
        row = ops.page_topk(q, *bounds_of(k, 4), 10, 4).flatten().tolist()
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 300 and len(row) == 40
