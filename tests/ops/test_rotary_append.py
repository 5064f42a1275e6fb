"""``rotary_append``: the bits of ``rotary`` and ``append_kv``, and nothing else in the caches' memory changes."""

from __future__ import annotations

import pytest
import torch
from effops import ops, reference
from effops.reference.bounds import rotary_append_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS, memory
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_is_rotary_and_append(dtype, data):
    """In all of the memory: guard bands, gaps and other slots stay as they are."""
    batch, tokens, capacity = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    heads, kv_heads, half = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20))
    dim = 2 * half + data.draw(st.sampled_from((0, 0, 1, 7)))
    place = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    qkv = data.draw(place)(normal(batch, tokens, heads + 2 * kv_heads, dim, dtype=DTYPES[dtype]))
    angles = 3 * normal(9, half, seed=1)
    cos, sin = data.draw(place)(angles.cos()), data.draw(place)(angles.sin())

    def indices(low: int, high: int) -> Tensor:
        one = st.integers(low, high)
        drawn = data.draw(st.lists(one, min_size=batch * tokens, max_size=batch * tokens))
        return data.draw(place)(int32(*drawn).view(batch, tokens))

    positions, slots, places = indices(0, 8), indices(-1, capacity - 1), [data.draw(place) for _ in range(2)]

    def caches() -> list[Tensor]:
        return [p(torch.full((batch, capacity, kv_heads, dim), torch.nan, dtype=qkv.dtype)) for p in places]

    got, expected = caches(), caches()
    q = ops.rotary_append(qkv, cos, sin, positions, *got, slots)
    parts = qkv.split([heads, kv_heads, kv_heads], 2)
    turned = [ops.rotary(x, cos, sin, positions) for x in parts[:2]]
    ops.append_kv(*expected, turned[1], parts[2], slots)
    assert same_bits(q, turned[0]) and q.is_contiguous()
    assert all(torch.equal(memory(a), memory(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_against_the_reference(dtype, threads):
    """More work than one thread takes."""
    torch.set_num_threads(threads)
    qkv, angles = normal(2, 40, 8, 64, dtype=DTYPES[dtype]), normal(50, 32, seed=1)
    positions = torch.arange(80, dtype=torch.int32).view(2, 40) % 50
    slots = torch.arange(39, -1, -1, dtype=torch.int32).expand(2, -1)
    got, expected = ([torch.zeros(2, 40, 2, 64, dtype=qkv.dtype) for _ in range(2)] for _ in range(2))
    arguments = qkv, angles.cos(), angles.sin(), positions
    q_bound, k_bound = rotary_append_bound(*arguments, *got, slots)
    q = ops.rotary_append(*arguments, *got, slots)
    reference.rotary_append(*arguments, *expected, slots)
    assert q_bound.worst(q) <= 1 and k_bound.worst(got[0].flip(1)) <= 1
    assert same_bits(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0])


def test_the_later_token_stays():
    qkv = normal(1, 3, 2, 2)
    caches, zero = [torch.zeros(1, 4, 1, 2) for _ in range(2)], torch.zeros(1, 1)
    q = ops.rotary_append(qkv, zero + 1, zero, int32(0, 0, 0)[None], *caches, int32(2, 0, 2)[None])
    assert q.shape == (1, 3, 0, 2)
    for i, cache in enumerate(caches):
        assert same_bits(cache[0, 2, 0], qkv[0, 2, i]) and same_bits(cache[0, 0, 0], qkv[0, 1, i])
        assert cache[0, 1::2].eq(0).all()


def test_bad_indices_write_nothing():
    caches = normal(2, 4, 1, 2), normal(2, 4, 1, 2, seed=1)
    before = [c.clone() for c in caches]
    qkv, table, good = normal(2, 2, 3, 2), torch.ones(4, 1), int32(0, 1, 2, 3).view(2, 2)
    for bad in (4, -2, 2**31 - 1, -(2**31)):
        wrong = int32(0, 1, 2, bad).view(2, 2)
        for name, positions, slots in (("positions", wrong, good), ("slots", good, wrong)):
            with pytest.raises(RuntimeError, match=rf"rotary_append: {name}: expected values in .+, got {bad} at"):
                ops.rotary_append(qkv, table, table, positions, *caches, slots)
        assert all(same_bits(a, b) for a, b in zip(caches, before, strict=True))


def test_autograd_knows_of_the_write():
    caches = normal(1, 4, 1, 2), normal(1, 4, 1, 2, seed=1)
    call = normal(1, 1, 3, 2), torch.ones(1, 1), torch.zeros(1, 1), int32(0)[None]
    versions = [c._version for c in caches]
    ops.rotary_append(*call, *caches, int32(0)[None])
    assert [c._version for c in caches] == [v + 1 for v in versions]
    torch.ops.effops.rotary_append(*call, *caches, int32(0)[None])
    assert [c._version for c in caches] == [v + 2 for v in versions]
    with torch.inference_mode():
        inside = [torch.zeros(1, 4, 1, 2) for _ in range(2)]
        ops.rotary_append(*call, *inside, int32(0)[None])
        assert inside[0][0, 0].ne(0).all()
