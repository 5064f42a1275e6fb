"""``merge_states``: within bounds, neutral empty parts, and the law that parts of the keys merge to the whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from effops import ops, reference
from effops.reference.bounds import Interval, attention_bound, merge_states_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import DIMS
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, KINDS, int32, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.core


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def worst(outs: Tensor, lses: Tensor) -> float:
    got = ops.merge_states(outs, lses)
    assert got[0].dtype == outs.dtype and got[1].dtype == lses.dtype
    return max(bound.worst(x) for bound, x in zip(merge_states_bound(outs, lses), got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    parts, rows = data.draw(st.integers(1, 9)), tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    dim, seed, kind = data.draw(st.sampled_from((*DIMS, 0))), data.draw(st.integers(0, 99)), st.sampled_from(KINDS)
    outs = values(parts, *rows, dim, dtype=DTYPES[dtype], seed=seed, kind=data.draw(kind))
    lses = data.draw(st.sampled_from((1.0, 8.0, 300.0))) * normal(parts, *rows, dtype=wide(outs.dtype), seed=seed + 1)
    lses[normal(parts, *rows, seed=seed + 3) > 1] = -torch.inf
    place = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    assert worst(data.draw(place)(outs), data.draw(place)(lses)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_neutral_parts(dtype):
    """A part with lse -inf changes no bit, whatever it holds; all of them give the empty set; one part is copied."""
    outs, lses = normal(3, 40, 33, dtype=DTYPES[dtype]), normal(3, 40, dtype=wide(DTYPES[dtype]), seed=1)
    plain = ops.merge_states(outs, lses)
    for at in range(4):
        more = torch.cat([outs[:at], torch.full_like(outs[:1], torch.nan), outs[at:]])
        weights = torch.cat([lses[:at], torch.full_like(lses[:1], -torch.inf), lses[at:]])
        assert all(same_bits(x, y) for x, y in zip(ops.merge_states(more, weights), plain, strict=True))
    out, lse = ops.merge_states(torch.full_like(outs, torch.nan), torch.full_like(lses, -torch.inf))
    assert out.eq(0).all() and lse.isneginf().all()
    assert same_bits(ops.merge_states(outs[:1], lses[:1])[0], outs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_weights(dtype):
    """A power of two parts with lse 0: the mean, up to the rounding of the weights' logarithm."""
    for parts in (2, 4, 8):
        outs = torch.randint(-8, 9, (parts, 70, 20), generator=torch.Generator().manual_seed(parts))
        out, lse = ops.merge_states(outs.to(DTYPES[dtype]), torch.zeros(parts, 70, dtype=wide(DTYPES[dtype])))
        torch.testing.assert_close(out.double(), outs.double().mean(0), rtol=2.0**-8, atol=2e-6)
        torch.testing.assert_close(lse, torch.full_like(lse, parts).log())


def test_rows_and_threads():
    """Enough work for threads: the same bits on each number of them, and each row as it is alone."""
    outs, lses = normal(4, 700, 96), 5 * normal(4, 700, seed=1)
    single = ops.merge_states(outs, lses)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(same_bits(x, y) for x, y in zip(ops.merge_states(outs, lses), single, strict=True))
    assert same_bits(ops.merge_states(outs[:, 311:312], lses[:, 311:312])[0], single[0][311:312])


def merged(q: Tensor, k: Tensor, v: Tensor, cuts: list[slice], parts: list[dict[str, Any]], **whole: Any) -> float:
    """Worst ratio of the merge of ``attention`` over cut keys to what the errors of its steps allow: each part is off
    by its own bound, the weights move with the errors of lse, the merge adds its own."""
    exact = [attention_bound(q, k[:, c], v[:, c], **o) for c, o in zip(cuts, parts, strict=True)]
    got = [ops.attention(q, k[:, c], v[:, c], return_lse=True, **o) for c, o in zip(cuts, parts, strict=True)]
    outs, lses = (torch.stack(x) for x in zip(*got, strict=True))
    out, lse = attention_bound(q, k, v, **whole)
    own_out, own_lse = merge_states_bound(outs, lses)
    weights, lse_error = torch.stack([x.value for _, x in exact]), torch.stack([x.error for _, x in exact]).amax(0)
    off = reference.merge_states(torch.stack([x.error for x, _ in exact]), weights)[0]
    size = reference.merge_states(outs.double().abs(), weights)[0]
    allowed = off + torch.expm1(2 * lse_error)[..., None] * size + own_out.error + out.error
    intervals = Interval(out.value, allowed), Interval(lse.value, lse_error + own_lse.error + lse.error)
    return max(i.worst(x) for i, x in zip(intervals, ops.merge_states(outs, lses), strict=True))


@pytest.mark.attention
@pytest.mark.parametrize("tokens", [1, 3, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_keys_merge_to_the_whole(dtype, tokens):
    q = normal(2, tokens, 4, 64, dtype=DTYPES[dtype])
    k, v = (normal(2, 300, 2, d, dtype=q.dtype, seed=d) for d in (64, 48))
    for points in ((1,), (64, 64), (100, 170), (299,), (50, 51, 52)):
        ends = [0, *points, 300]
        cuts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        assert merged(q, k, v, cuts, [{}] * len(cuts)) <= 1, points
    # A shared prefix that all see and a causal rest: the whole is causal, for the prefix ends before the queries.
    assert merged(q, k, v, [slice(0, 200), slice(200, 300)], [{}, {"causal": True}], causal=True) <= 1
    # Sequences of different lengths: the second part's lengths count from the cut.
    lens = int32(300, 120)
    parts = [{"kv_lens": lens.clamp(max=100)}, {"kv_lens": lens - 100}]
    assert merged(q, k, v, [slice(0, 100), slice(100, 300)], parts, kv_lens=lens) <= 1


@pytest.mark.attention
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_one_part_carries_the_sink(dtype, tokens):
    q = normal(2, tokens, 4, 64, dtype=DTYPES[dtype])
    k, v = (normal(2, 90, 2, d, dtype=q.dtype, seed=d) for d in (64, 48))
    sinks, cuts = {"sink_logits": torch.tensor([0.0, 5.0, -3.0, 2.0])}, [slice(0, 40), slice(40, 90)]
    assert merged(q, k, v, cuts, [sinks, {}], **sinks) <= 1
    assert merged(q, k, v, cuts, [{}, sinks], **sinks) <= 1
    assert merged(q, k, v, cuts, [sinks, sinks], **sinks) > 1
    assert merged(q, k, v, [slice(0, 0), slice(0, 90)], [sinks, {}], **sinks) <= 1, "a part without keys carries it"
