"""``merge_kv``: within its bounds on any call, exact where keys are orthogonal or equal, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.reference.merging_bounds import merge_kv_bound, similarity_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import DIMS, lengths
from strategies.layouts import LAYOUTS, embed, memory
from strategies.values import DTYPES, int32, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.core
MODES = ("none", "averaged", "pivotal", "weighted")
PLACES = st.sampled_from([*LAYOUTS.values(), lambda x: embed(x, [1, 0, *range(2, x.dim())], before=1, behind=2)])


def chosen(lens: list[int], heads: int, width: int, share: float, seed: int) -> Tensor:
    """int32 [B,G,width]: about this share of each sequence's entries, another set for each head."""
    kept = torch.full((len(lens), heads, width), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    for b, n in enumerate(lens):
        for g in range(heads):
            own = (torch.rand(n, generator=generator) < share).nonzero().flatten()[:width]
            kept[b, g, : len(own)] = own
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    """The assignment is a nearest one up to rounding, the rows are what it says, nothing else is written."""
    batch, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    slots = data.draw(st.sampled_from((1, 2, 5, 9, 64, 130, sized(300, 140))))
    dims = data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(DIMS))
    seed, kind = (
        data.draw(st.integers(0, 99)),
        data.draw(st.sampled_from(("normal", "spikes", "large", "tiny", "zeros"))),
    )
    lens = data.draw(lengths(batch, slots))
    plain = [values(batch, slots, heads, d, dtype=DTYPES[dtype], seed=seed + i, kind=kind) for i, d in enumerate(dims)]
    counts = [slots] * batch if lens is None else lens.tolist()
    for x in plain:
        for b, n in enumerate(counts):
            x[b, n:] = torch.nan
    share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
    kept = chosen(counts, heads, data.draw(st.sampled_from((slots, slots + 3, max(slots // 2, 1)))), share, seed)
    options: dict[str, Any] = {"merging": data.draw(st.sampled_from(MODES))}
    least = data.draw(st.sampled_from((None, -0.5, 0.0, 0.3, 2.0)))
    places = [data.draw(PLACES) for _ in range(2)]
    got, before = ([place(x) for place, x in zip(places, plain, strict=True)] for _ in range(2))
    nearest, similarity = ops.merge_kv(*got, data.draw(PLACES)(kept), kv_lens=lens, least_similarity=least, **options)

    existing = [torch.where(x.isnan(), 0, x) for x in plain]
    scores = similarity_bound(existing[0])
    for b, n in enumerate(counts):
        for g in range(heads):
            own = kept[b, g][kept[b, g] >= 0].long()
            to, how = nearest[b, g], similarity[b, g].double()
            assert to[own].tolist() == list(range(len(own))) and how[own].eq(1).all()
            assert to[n:].eq(-1).all() and how[n:].eq(0).all()
            others = torch.ones(slots, dtype=torch.bool).index_fill(0, own, False)
            others[n:] = False
            if not len(own) or options["merging"] == "none":
                assert to[others].eq(-1).all() and how[others].eq(0).all()
                continue
            value, error = (x[b, g][others][:, own] for x in scores)
            assert ((how[others] - value.amax(-1)).abs() <= error.amax(-1)).all()
            merged = to[others] >= 0
            assert torch.equal(merged, how[others] >= (-torch.inf if least is None else least))
            found = value[merged].gather(1, to[others][merged].long()[:, None])[:, 0]
            assert (found >= (value - 2 * error)[merged].amax(-1)).all()
    there = (kept >= 0).transpose(1, 2)
    for a, x, old in zip(got, existing, before, strict=True):
        bound = merge_kv_bound(x, kept, nearest, similarity, kv_lens=lens, **options)
        rows = there[:, :slots, :, None].expand(-1, -1, -1, x.shape[3])
        whole = torch.zeros_like(x, dtype=torch.bool)
        whole[:, : rows.shape[1]] = rows
        assert type(bound)(*(y[:, :slots][rows] for y in bound)).worst(a[whole]) <= 1
        a[whole] = old[whole]
        assert torch.equal(memory(a), memory(old))


def caches(dtype: torch.dtype, length: int = 150) -> list[Tensor]:
    """Keys and values: B 2, G 3."""
    return [normal(2, length, 3, d, dtype=dtype, seed=d) for d in (16, 9)]


def merge(held: list[Tensor], kept: Tensor, **options: Any) -> tuple[list[Tensor], ops.MergedEntries]:
    held = [x.clone() for x in held]
    return held, ops.merge_kv(*held, kept, **options)


@pytest.mark.parametrize("merging", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_kept_is_the_identity(dtype, merging):
    held, lens = caches(DTYPES[dtype]), int32(150, 97)
    kept = chosen(lens.tolist(), 3, 150, 1.0, 0)
    got, merged = merge(held, kept, kv_lens=lens, merging=merging)
    assert all(same_bits(a, b) for a, b in zip(got, held, strict=True))
    assert torch.equal(merged.nearest, kept) and torch.equal(merged.similarity, (kept >= 0).to(merged.similarity.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_is_a_gather(dtype):
    held, lens = caches(DTYPES[dtype]), int32(150, 97)
    kept = chosen(lens.tolist(), 3, 80, 0.3, 1)
    got, merged = merge(held, kept, kv_lens=lens, merging="none")
    for b in range(2):
        for g in range(3):
            own = kept[b, g][kept[b, g] >= 0].long()
            for a, x in zip(got, held, strict=True):
                assert same_bits(a[b, : len(own), g], x[b, own, g]) and same_bits(
                    a[b, len(own) :, g], x[b, len(own) :, g]
                )
    assert merged.nearest.ge(0).sum() == kept.ge(0).sum() and merged.similarity.sum() == kept.ge(0).sum()


@pytest.mark.parametrize("merging", ["averaged", "pivotal", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonal_keys(dtype, merging):
    """Entry j's key is a multiple of unit vector j % 8, the first eight stay: sums of whole numbers, divided by 4."""
    j = torch.arange(32)
    k = torch.nn.functional.one_hot(j % 8, 11) * (1 + j // 8)[:, None]
    v = torch.stack([j, -2 * j, j % 5], 1)
    held = [x.to(DTYPES[dtype])[None, :, None].expand(2, -1, 2, -1).clone() for x in (k, v)]
    kept = torch.arange(8, dtype=torch.int32).expand(2, 2, 8)
    got, merged = merge(held, kept, merging=merging)
    assert torch.equal(merged.nearest, (j % 8).int().expand(2, 2, 32)) and merged.similarity.eq(1).all()
    for a, x in zip(got, (k, v), strict=True):
        others = x.double().view(4, 8, -1)
        own = others[0]
        sums = others[1:].sum(0) if merging != "pivotal" else (others[1:].sum(0) + 3 * own) / 2
        assert torch.equal(a[:, :8], ((own + sums) / 4).to(a.dtype)[None, :, None].expand(2, -1, 2, -1))
        assert torch.equal(a[:, 8:], x[8:].to(a.dtype)[None, :, None].expand(2, -1, 2, -1))


@pytest.mark.parametrize("merging", ["averaged", "pivotal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_leave_an_entry_as_it_is(dtype, merging):
    """Any number of evicted entries with the key and the value of a kept one."""
    held = caches(DTYPES[dtype], 40)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)) % 40
    held = [x[:, order] for x in held]
    first = torch.stack([(order == i).nonzero()[0, 0] for i in range(40)]).sort().values
    got, merged = merge(held, first.int().expand(2, 3, 40), merging=merging)
    assert torch.equal(
        merged.nearest, torch.stack([(order[first] == i).nonzero()[0, 0] for i in order]).int().expand(2, 3, -1)
    )
    assert all(torch.equal(a[:, :40], x[:, first]) for a, x in zip(got, held, strict=True))


@pytest.mark.parametrize("merging", ["averaged", "pivotal", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_evicted_entries_changes_rounding_alone(dtype, merging):
    held, kept = caches(DTYPES[dtype]), torch.arange(0, 150, 7, dtype=torch.int32)
    others = torch.ones(150, dtype=torch.bool).index_fill(0, kept.long(), False).nonzero().flatten()
    shuffled = torch.arange(150)
    shuffled[others] = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(1))]
    every = kept.expand(2, 3, -1)
    plain, merged = merge(held, every, merging=merging)
    other, again = merge([x[:, shuffled] for x in held], every, merging=merging)
    assert same_bits(again.similarity, merged.similarity[..., shuffled])
    assert torch.equal(again.nearest, merged.nearest[..., shuffled])
    for a, b, x in zip(plain, other, held, strict=True):
        bound = merge_kv_bound(x, every, *merged, merging=merging)
        assert bound.worst(a[:, : len(kept)]) <= 1 and bound.worst(b[:, : len(kept)]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_alone_in_a_batch_and_with_other_threads(dtype):
    """A head of a sequence does alone what it does among others."""
    held, lens = caches(DTYPES[dtype], 400), int32(400, 333)
    kept = chosen(lens.tolist(), 3, 400, 0.2, 2)
    got, merged = merge(held, kept, kv_lens=lens)
    for b in range(2):
        for g in range(3):
            rows, heads = slice(b, b + 1), slice(g, g + 1)
            alone, own = merge([x[rows, :, heads] for x in held], kept[rows, heads], kv_lens=lens[rows])
            assert all(same_bits(a, x[rows, :, heads]) for a, x in zip(alone, got, strict=True))
            assert all(same_bits(a, x[rows, heads]) for a, x in zip(own, merged, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again, _ = merge(held, kept, kv_lens=lens)
        assert all(same_bits(a, b) for a, b in zip(again, got, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_of_equally_near_keys_the_first():
    """Keys that are multiples of one another by a power of 2 are alike to the last bit; zeros are like none."""
    k = normal(1, 5, 1, 7)
    k[0, 2], k[0, 3], k[0, 4] = 4 * k[0, 1], 0.5 * k[0, 1], 0
    held = [k, normal(1, 5, 1, 3)]
    for kept, expected in ((int32(1, 2), [None, 0, 1, 0, 0]), (int32(2, 4), [None, 0, 0, 0, 1])):
        _, merged = merge(held, kept[None, None])
        assert merged.nearest[0, 0, 1:].tolist() == expected[1:]
    assert merged.similarity[0, 0, 1] == merged.similarity[0, 0, 3]
    _, merged = merge(held, int32(2, 3)[None, None])
    assert merged.nearest[0, 0, 4] == 0 and merged.similarity[0, 0, 4] == 0
    _, merged = merge([torch.zeros(1, 300, 1, 3), normal(1, 300, 1, 2)], torch.arange(1, 300, 2).int()[None, None])
    assert merged.nearest[0, 0, ::2].eq(0).all() and merged.similarity[0, 0, ::2].eq(0).all()


@pytest.mark.parametrize("entry", [0.0, 1e-40, torch.inf, -torch.inf, torch.nan, 3e38])
def test_norms_that_are_no_normal_number(entry):
    """Their keys are like none: they are merged into the first, and take in what is less than orthogonal to others."""
    k = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [entry] * 4, [-1, -1, 0, 0]])[None, :, None]
    _, merged = merge([k, normal(1, 4, 1, 2)], int32(0, 1)[None, None])
    assert merged.nearest[0, 0, 2] == 0 and merged.similarity[0, 0, 2] == 0
    _, merged = merge([k, normal(1, 4, 1, 2)], int32(0, 1, 2)[None, None])
    assert merged.nearest[0, 0, 3] == 2 and merged.similarity[0, 0, 3] == 0


def test_the_least_similarity():
    """From the one of an entry on it is merged; below it leaves no trace."""
    held = caches(torch.float32)
    kept = torch.arange(0, 150, 5, dtype=torch.int32).expand(2, 3, -1)
    every, merged = merge(held, kept)
    others = merged.similarity != 1
    at = float(merged.similarity[others].median())
    got, filtered = merge(held, kept, least_similarity=at)
    assert torch.equal(filtered.nearest, torch.where(merged.similarity.double() >= at, merged.nearest, -1))
    assert (filtered.nearest[others] == -1).any() and (filtered.nearest[others] >= 0).any()
    assert same_bits(filtered.similarity, merged.similarity) and not same_bits(got[1], every[1])
    got, filtered = merge(held, kept, least_similarity=2.0)
    plain, _ = merge(held, kept, merging="none")
    assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True)) and same_bits(
        filtered.similarity, merged.similarity
    )


def test_nothing_to_merge_or_to_merge_into():
    held = caches(torch.float32, 5)
    for kept, lens in (
        (torch.empty(2, 3, 0), None),
        (torch.full((2, 3, 4), -1), None),
        (torch.full((2, 3, 1), -1), int32(0, 0)),
    ):
        got, merged = merge(held, kept.int(), kv_lens=lens)
        assert all(same_bits(a, b) for a, b in zip(got, held, strict=True))
        assert merged.nearest.eq(-1).all() and merged.similarity.eq(0).all()
    for cut in ((slice(0, 0),), (slice(None), slice(0, 0)), (slice(None), slice(None), slice(0, 0))):
        empty = [x[cut] for x in held]
        kept = torch.full((empty[0].shape[0], empty[0].shape[2], 2), -1, dtype=torch.int32)
        _, merged = merge(empty, kept)
        assert merged.nearest.shape == merged.similarity.shape == (*kept.shape[:2], empty[0].shape[1])


@pytest.mark.parametrize("merging", MODES)
def test_the_reference(merging):
    """float64 keys whose nearest are apart: the same assignment, and rows within the bound."""
    held, lens = caches(torch.float64), int32(150, 97)
    kept = chosen(lens.tolist(), 3, 150, 0.3, 3)
    got, merged = merge(held, kept, kv_lens=lens, merging=merging, least_similarity=0.1)
    expected = [x.clone() for x in held]
    nearest, similarity = reference.merge_kv(*expected, kept, kv_lens=lens, merging=merging, least_similarity=0.1)
    assert torch.equal(merged.nearest, nearest) and (merged.similarity - similarity).abs().max() < 1e-13
    assert all((a - b).abs().max() < 1e-13 for a, b in zip(got, expected, strict=True))


def test_autograd_knows_of_the_write():
    held = caches(torch.float32)
    versions = [x._version for x in held]
    ops.merge_kv(*held, torch.zeros(2, 3, 1, dtype=torch.int32))
    assert [x._version for x in held] == [v + 1 for v in versions]
