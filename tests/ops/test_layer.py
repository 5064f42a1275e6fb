"""``rms_norm``, ``rotary``, ``silu_mul``: within bounds in every dtype and layout, exact where the arithmetic is."""

from __future__ import annotations

import pytest
import torch
from effops import ops
from effops.reference.bounds import rms_norm_bound, rotary_bound, silu_mul_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, KINDS, int32, normal, same_bits, values

pytestmark = pytest.mark.core

SHAPES = [(), (1,), (3,), (0,), (2, 5), (3, 1, 4), (2, 0, 3), (2, 3, 2, 2)]
PLACES = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)


@DTYPE
@given(data=st.data())
def test_rms_norm(dtype, data):
    shape, dim = data.draw(st.sampled_from(SHAPES)), data.draw(st.integers(1, 70) | st.sampled_from((128, 333)))
    eps, offset = data.draw(st.sampled_from((1e-6, 1e-2, 3.0))), data.draw(st.sampled_from((0.0, 1.0, -0.5)))
    kind = data.draw(st.sampled_from([k for k in KINDS if k != "subnormal"]))
    x = data.draw(PLACES)(values(*shape, dim, dtype=DTYPES[dtype], seed=dim, kind=kind))
    w = data.draw(PLACES)(normal(dim, dtype=x.dtype, seed=1))
    got = ops.rms_norm(x, w, eps, weight_offset=offset)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert rms_norm_bound(x, w, eps, weight_offset=offset).worst(got) <= 1


@DTYPE
def test_rms_norm_of_one_magnitude(dtype):
    """±a has the root mean square a: the weight comes back with the signs."""
    for dim in (1, 5, 16, 33, 64, 100):
        x = 4 * normal(3, dim, dtype=DTYPES[dtype]).sign()
        w = torch.arange(1, dim + 1).to(x.dtype)
        assert same_bits(ops.rms_norm(x, w, 0.0), x.sign() * w)
        assert same_bits(ops.rms_norm(x, w - 1, 0.0, weight_offset=1.0), x.sign() * w)


@DTYPE
@given(data=st.data())
def test_rotary(dtype, data):
    batch, tokens, heads = (data.draw(st.integers(0, n)) for n in (3, 4, 3))
    half = data.draw(st.integers(0, 40))
    dim = 2 * half + data.draw(st.sampled_from((0, 0, 1, 7, 40)))
    places, kind = data.draw(st.integers(1, 50)), data.draw(st.sampled_from(KINDS))
    x = data.draw(PLACES)(values(batch, tokens, heads, dim, dtype=DTYPES[dtype], seed=dim, kind=kind))
    angles = 3 * normal(places, half, seed=1)
    cos, sin = data.draw(PLACES)(angles.cos()), data.draw(PLACES)(angles.sin())
    positions = data.draw(st.lists(st.integers(0, places - 1), min_size=batch * tokens, max_size=batch * tokens))
    positions = data.draw(PLACES)(int32(*positions).view(batch, tokens))
    got = ops.rotary(x, cos, sin, positions)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert rotary_bound(x, cos, sin, positions).worst(got) <= 1
    assert same_bits(got[..., 2 * half :].contiguous(), x[..., 2 * half :].contiguous())


@DTYPE
def test_rotary_by_right_angles(dtype):
    """Quarter turns exchange the halves, and each position takes its own row of the tables."""
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    x = normal(2, 4, 3, 46, dtype=DTYPES[dtype])
    positions = int32(0, 1, 2, 3, 3, 2, 2, 1).view(2, 4)
    got = ops.rotary(x, turns[:, :1].repeat(1, 23), turns[:, 1:].repeat(1, 23), positions)
    a, b = x.chunk(2, -1)
    options = [torch.cat(pair, -1) for pair in ((a, b), (-b, a), (-a, -b), (b, -a))]
    for i in range(2):
        for t in range(4):
            assert torch.equal(got[i, t], options[positions[i, t]][i, t])


@DTYPE
@given(data=st.data())
def test_silu_mul(dtype, data):
    shape, half = data.draw(st.sampled_from(SHAPES)), data.draw(st.integers(0, 70) | st.sampled_from((128, 333)))
    kind = data.draw(st.sampled_from(KINDS))
    x = data.draw(PLACES)(values(*shape, 2 * half, dtype=DTYPES[dtype], seed=half, kind=kind))
    got = ops.silu_mul(x)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert silu_mul_bound(x).worst(got) <= 1


@DTYPE
def test_silu_mul_far_from_zero(dtype):
    """Where the sigmoid is 1 the gate passes unchanged, where it is 0 nothing does: no NaN from exp's ends."""
    gate, up = torch.tensor([60.0, 200.0, 3e4, -200.0, -3e4, 0.0]), torch.tensor([2.0, 0.5, 1.0, 2.0, 1.0, 5.0])
    got = ops.silu_mul(torch.cat([gate, up]).to(DTYPES[dtype]))
    expected = torch.where(gate > 0, gate * up, 0.0).to(DTYPES[dtype])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-40)


@DTYPE
def test_layout_rows_and_threads_do_not_matter(dtype):
    """More rows than one thread takes, as each row is alone, in any memory."""
    x, w = normal(2, 60, 5, 200, dtype=DTYPES[dtype]), normal(200, dtype=DTYPES[dtype], seed=1)
    angles = normal(9, 40)
    positions = torch.arange(120, dtype=torch.int32).view(2, 60) % 9
    calls = {
        "rms_norm": lambda x, p: ops.rms_norm(x, w),
        "rotary": lambda x, p: ops.rotary(x, angles.cos(), angles.sin(), p),
        "silu_mul": lambda x, p: ops.silu_mul(x),
    }
    for name, call in calls.items():
        plain = call(x, positions)
        assert all(same_bits(call(place(x), place(positions)), plain) for place in LAYOUTS.values()), name
        alone = call(x[1:, 41:42], positions[1:, 41:42])
        assert same_bits(alone, plain[1:, 41:42].contiguous()), name
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same_bits(call(x, positions), plain), name
        torch.set_num_threads(1)
