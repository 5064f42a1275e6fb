"""``moe_sort``, ``moe_permute`` and ``moe_unpermute``: exact orders, sums within bounds, laws between them."""

from __future__ import annotations

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.reference.moe_bounds import moe_unpermute_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.experts import PLACES, choices, weights_of
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, KINDS, int32, normal, same_bits, values

pytestmark = pytest.mark.core

DTYPE = pytest.mark.parametrize("dtype", DTYPES)
DIMS = st.sampled_from((0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130))


@given(data=st.data())
def test_sort_is_the_stable_one(data):
    tokens, k, experts = (data.draw(st.integers(low, high)) for low, high in ((0, 40), (0, 5), (1, 20)))
    ids = data.draw(choices(tokens, k, experts))
    got, expected = ops.moe_sort(data.draw(PLACES)(ids), experts), reference.moe_sort(ids, experts)
    assert all(map(same_bits, got, expected))


def test_sort_by_hand():
    order, inverse, offsets = ops.moe_sort(int32(2, 0, -1, 2, 0, 2).view(3, 2), 4)
    assert order.tolist() == [1, 4, 0, 3, 5, 2]
    assert inverse.tolist() == [[2, 0], [-1, 3], [1, 4]]
    assert offsets.tolist() == [2, 2, 5, 5]


def test_sort_of_many():
    """More slots than a tile of any kernel has, and more experts than threads of a block."""
    for experts in (1, 3, 300, 2000):
        ids = torch.randint(-1, experts, (sized(3000, 400), 3), generator=torch.Generator().manual_seed(1)).int()
        assert all(map(same_bits, ops.moe_sort(ids, experts), reference.moe_sort(ids, experts)))


@DTYPE
@given(data=st.data())
def test_permute(dtype, data):
    """Copies, bit by bit, NaN among them; zeros for what was dropped."""
    tokens, k, experts, dim = (data.draw(s) for s in (st.integers(0, 20), st.integers(0, 4), st.integers(1, 9), DIMS))
    ids, x = data.draw(choices(tokens, k, experts)), normal(tokens, dim, dtype=DTYPES[dtype])
    if x.numel():
        x[0, 0] = torch.nan
    got = ops.moe_permute(data.draw(PLACES)(x), data.draw(PLACES)(ids), experts)
    assert all(map(same_bits, got, reference.moe_permute(x, ids, experts)))


@DTYPE
@given(data=st.data())
def test_unpermute(dtype, data):
    """Within the bound for any places, those that come twice, or never, among them; what is absent may be NaN."""
    tokens, k, rows, dim = (data.draw(s) for s in (st.integers(0, 20), st.integers(0, 4), st.integers(0, 30), DIMS))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(KINDS))
    y = values(rows, dim, dtype=DTYPES[dtype], seed=seed, kind=kind)
    inverse = data.draw(choices(tokens, k, rows)) if rows else torch.full((tokens, k), -1, dtype=torch.int32)
    weights = (
        weights_of(tokens, k, y.dtype, seed).masked_fill(inverse < 0, torch.nan) if data.draw(st.booleans()) else None
    )
    place = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    placed = None if weights is None else data.draw(place)(weights)
    got = ops.moe_unpermute(data.draw(place)(y), placed, data.draw(place)(inverse))
    assert got.dtype == y.dtype and got.is_contiguous()
    assert moe_unpermute_bound(y, weights, inverse).worst(got) <= 1
    assert (got[(inverse < 0).all(-1)] == 0).all()


@DTYPE
def test_unpermute_of_integers_is_exact(dtype):
    y = torch.randint(-8, 9, (50, 70), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    inverse = torch.randint(-1, 50, (33, 4), generator=torch.Generator().manual_seed(2)).int()
    weights = torch.randint(0, 3, (33, 4), generator=torch.Generator().manual_seed(3)) / 2
    got = ops.moe_unpermute(y, weights.to(weights_of(1, 1, y.dtype).dtype), inverse)
    kept = torch.where(inverse < 0, 0, weights)
    assert same_bits(got, (kept[..., None] * y[inverse.clamp(min=0).long()].double()).sum(1).to(y.dtype) + 0.0)


@DTYPE
def test_there_and_back(dtype):
    """Once for each kept choice: times k where none is dropped; weights that are powers of two scale exactly."""
    for experts, k in ((1, 1), (5, 2), (9, 4)):
        x = normal(21, 37, dtype=DTYPES[dtype])
        ids = torch.randint(experts, (21, k), generator=torch.Generator().manual_seed(k)).int()
        ids[3], ids[4, 0] = -1, -1
        xp, offsets, inverse = ops.moe_permute(x, ids, experts)
        assert offsets[-1] == (ids >= 0).sum() and (xp[offsets[-1] :] == 0).all()
        kept = (ids >= 0).sum(-1, keepdim=True)
        only = x.masked_fill(kept == 0, 0)
        ones = ops.moe_unpermute(xp, None, inverse)
        assert same_bits(ones[kept[:, 0] == 1], only[kept[:, 0] == 1])
        mean = weights_of(21, k, x.dtype).fill_(1) / kept.clamp(min=1)
        exact = (kept == 1) | (kept == 2) | (kept == 4)
        back = ops.moe_unpermute(xp, mean, inverse)
        assert same_bits(back[exact[:, 0]], x[exact[:, 0]]) and (back[3] == 0).all()


@DTYPE
def test_dropping_the_last_choices_drops_columns(dtype):
    """-1 has the bits of a choice that is not there; so has a weight of zero up to the sign of zero."""
    x, experts = normal(19, 40, dtype=DTYPES[dtype]), 6
    ids = torch.randint(experts, (19, 4), generator=torch.Generator().manual_seed(5)).int()
    weights = weights_of(19, 4, x.dtype)
    cut = torch.where(torch.arange(4) < 2, ids, -1)
    xp, offsets, inverse = ops.moe_permute(x, cut, experts)
    alone, ends, places = ops.moe_permute(x, ids[:, :2], experts)
    assert same_bits(ends, offsets) and same_bits(places, inverse[:, :2].contiguous())
    assert same_bits(alone, xp[: offsets[-1]])
    got = ops.moe_unpermute(xp, weights, inverse)
    assert same_bits(got, ops.moe_unpermute(alone, weights[:, :2], places))


@DTYPE
def test_permuted_tokens(dtype):
    """Tokens in another order come out in that order, with the same bits."""
    x, experts = normal(23, 45, dtype=DTYPES[dtype]), 7
    ids = torch.randint(-1, experts, (23, 3), generator=torch.Generator().manual_seed(6)).int()
    weights, order = weights_of(23, 3, x.dtype), torch.randperm(23, generator=torch.Generator().manual_seed(7))

    def both(x, ids, weights):
        xp, _, inverse = ops.moe_permute(x, ids, experts)
        return ops.moe_unpermute(xp, weights, inverse)

    assert same_bits(both(x[order], ids[order], weights[order]), both(x, ids, weights)[order])


@DTYPE
def test_nan_stays_in_the_tokens_that_name_it(dtype):
    y, weights = normal(30, 50, dtype=DTYPES[dtype]), weights_of(20, 3, DTYPES[dtype])
    inverse = torch.randint(-1, 30, (20, 3), generator=torch.Generator().manual_seed(8)).int()
    plain = ops.moe_unpermute(y, weights, inverse)
    flawed = y.clone()
    at = int(inverse[7, 1].clamp(min=0))
    flawed[at, 49] = torch.nan
    got = ops.moe_unpermute(flawed, weights, inverse)
    named = (inverse == at).any(-1)
    assert named.any() and torch.equal(got.isnan()[:, 49], named) and not got[:, :49].isnan().any()
    got[:, 49] = torch.where(named, plain[:, 49], got[:, 49])
    assert same_bits(got, plain)


@DTYPE
def test_threads_do_not_matter(dtype):
    tokens, experts = sized(900, 30), 12
    x, weights = normal(tokens, 200, dtype=DTYPES[dtype]), weights_of(tokens, 4, DTYPES[dtype])
    ids = torch.randint(-1, experts, (tokens, 4), generator=torch.Generator().manual_seed(9)).int()
    xp, offsets, inverse = ops.moe_permute(x, ids, experts)
    out = ops.moe_unpermute(xp, weights, inverse)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(same_bits, ops.moe_permute(x, ids, experts), (xp, offsets, inverse)))
        assert same_bits(ops.moe_unpermute(xp, weights, inverse), out)
