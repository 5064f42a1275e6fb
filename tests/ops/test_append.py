"""``append_kv``: what it writes, and that nothing else in the cache's memory changes."""

from __future__ import annotations

import pytest
import torch
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import DIMS
from strategies.layouts import LAYOUTS, memory
from strategies.values import DTYPES, bits, int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    """Against the reference, compared in all of the memory: guard bands, gaps and other slots stay as they are."""
    batch, tokens, capacity = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    heads, dim, v_dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(DIMS))
    layout = st.sampled_from(list(LAYOUTS))
    k, v = (
        LAYOUTS[data.draw(layout)](normal(batch, tokens, heads, d, dtype=DTYPES[dtype], seed=d)) for d in (dim, v_dim)
    )
    one = st.integers(-1, capacity - 1)
    slots = data.draw(st.lists(one, min_size=batch * tokens, max_size=batch * tokens))
    slots = LAYOUTS[data.draw(layout)](int32(*slots).view(batch, tokens))
    places = [LAYOUTS[data.draw(layout)] for _ in range(2)]

    def caches() -> list[Tensor]:
        return [
            place(torch.full((batch, capacity, heads, d), torch.nan, dtype=k.dtype))
            for place, d in zip(places, (dim, v_dim), strict=True)
        ]

    got, expected = caches(), caches()
    ops.append_kv(*got, k, v, slots)
    reference.append_kv(*expected, k, v, slots)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(memory(a), memory(b))


def test_the_later_token_stays():
    caches = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 3)
    k, v = normal(1, 3, 1, 2), normal(1, 3, 1, 3)
    ops.append_kv(*caches, k, v, int32(2, 0, 2)[None])
    assert same_bits(caches[0][0, 2], k[0, 2]) and same_bits(caches[1][0, 2], v[0, 2])
    assert same_bits(caches[0][0, 0], k[0, 1]) and caches[0][0, 1::2].eq(0).all()


def test_special_values_are_copied_bit_for_bit():
    strange = torch.tensor([0x7F800001, -0x400000, 0x80000000 - 2**32, 1, 0x7F800000], dtype=torch.int64).int()
    x = strange.view(torch.float32).view(1, 1, 1, 5)
    caches = torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 5)
    ops.append_kv(*caches, x, x, int32(1)[None])
    assert torch.equal(bits(caches[0][0, 1]).flatten(), strange)


def test_a_bad_slot_writes_nothing():
    """The bad slot comes last: all slots are looked at before the first write."""
    caches = normal(2, 4, 1, 3), normal(2, 4, 1, 3, seed=1)
    before = [c.clone() for c in caches]
    new = normal(2, 2, 1, 3, seed=2)
    for slot in (4, -2, 2**31 - 1, -(2**31)):
        with pytest.raises(RuntimeError, match=rf"append_kv: slots: expected values in \[-1, 4\), got {slot} at index"):
            ops.append_kv(*caches, new, new, int32(0, 1, 2, slot).view(2, 2))
        assert all(same_bits(a, b) for a, b in zip(caches, before, strict=True))


def test_autograd_knows_of_the_write():
    caches = normal(1, 4, 1, 3), normal(1, 4, 1, 3, seed=1)
    x = normal(1, 4, 1, 3, seed=2).requires_grad_()
    products = [(x * c).sum() for c in caches]
    versions = [c._version for c in caches]
    ops.append_kv(*caches, normal(1, 1, 1, 3), normal(1, 1, 1, 3), int32(0)[None])
    assert [c._version for c in caches] == [v + 1 for v in versions]
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        inside = torch.zeros(1, 4, 1, 3), torch.zeros(1, 4, 1, 3)
        ops.append_kv(*inside, normal(1, 1, 1, 3), normal(1, 1, 1, 3), int32(0)[None])
        assert inside[0][0, 0].ne(0).all()
