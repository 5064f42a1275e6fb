"""``pim_gemv``: the bits of its bank-ordered reference on any call, exact sums where there are, and its laws."""

from __future__ import annotations

import pytest
import torch
from backend import NAME, cpu_only, sized
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS, embed
from strategies.values import DTYPES, int32, normal, same_bits, values

pytestmark = pytest.mark.core
PLACES = st.sampled_from([*LAYOUTS.values(), lambda x: embed(x, [1, 0, *range(2, x.dim())], before=1, behind=2)])
OWN = {name: dtype for name, dtype in DTYPES.items() if NAME == "cpu" or dtype != torch.float64}


@st.composite
def calls(draw, dtype: torch.dtype) -> dict:
    batch, count = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    units, tiles, chunks = draw(st.sampled_from((1, 3, 8, 32))), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lanes = draw(st.sampled_from((1, 2, 8, 16, 64)))
    row = draw(st.sampled_from((8, 12, 64, sized(128, 32))))
    width = draw(st.integers(0, chunks * row))
    out = draw(st.integers(0, tiles * units))
    seed, kind = draw(st.integers(0, 99)), draw(st.sampled_from(("normal", "spikes", "large", "tiny", "zeros")))
    call = {
        "x": values(batch, count, width, dtype=dtype, seed=seed, kind=kind),
        "banks": values(batch, tiles, chunks, units, row, dtype=dtype, seed=seed + 1, kind=kind),
        "out_features": out,
        "sum_values": draw(st.sampled_from([d for d in range(1, row + 1) if row % d == 0])),
        "lanes": lanes,
        "channels": draw(st.sampled_from((1, 2, 32))),
        "narrow_results": draw(st.booleans()),
    }
    for name, most in (("rows", out), ("columns", width)):
        call[name] = int32(*[draw(st.integers(0, most)) for _ in range(batch)]) if draw(st.booleans()) else None
    return call


@pytest.mark.parametrize("dtype", OWN)
@given(data=st.data())
def test_any_call_has_the_bits_of_the_reference(dtype, data):
    """Values that no length covers are never read: they hold NaN."""
    call = data.draw(calls(OWN[dtype]))
    expected = reference.pim_gemv(**call)
    x, banks = call["x"].clone(), call["banks"].clone()
    units, row = banks.shape[3:]
    for b in range(x.shape[0]):
        width = x.shape[2] if call["columns"] is None else int(call["columns"][b])
        out = call["out_features"] if call["rows"] is None else int(call["rows"][b])
        x[b, :, width:] = torch.nan
        flat = banks[b].transpose(1, 2).reshape(-1, banks.shape[2] * row).clone()  # [tiles * units, chunks * values]
        flat[out:], flat[:, width:] = torch.nan, torch.nan
        banks[b] = flat.view(banks.shape[1], units, banks.shape[2], row).transpose(1, 2)
    call |= {"x": data.draw(PLACES)(x), "banks": data.draw(PLACES)(banks)}
    assert same_bits(ops.pim_gemv(**call), expected)


def test_bits_do_not_depend_on_threads():
    x, banks = (
        values(*s, dtype=torch.float16, seed=i, kind="normal") for i, s in enumerate(((1, 2, 900), (1, 9, 2, 32, 512)))
    )
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [ops.pim_gemv(x, banks, 280, 512, 16, channels=channels) for channels in (1, 4, 32, 2**60)]
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_integers_are_exact(dtype):
    """Sums of a few small integers are exact in every format and order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (2, 3, 40), generator=generator).to(dtype)
    banks = torch.randint(-2, 3, (2, 2, 2, 16, 32), generator=generator).to(dtype)
    matrix = banks.transpose(2, 3).reshape(2, 32, 64)[:, :, :40]
    got = ops.pim_gemv(x, banks, 32, 8, 4)
    assert torch.equal(got.sum(-1), torch.einsum("bmk,bnk->bmn", x.float(), matrix.float()))


def test_results_are_rounded_once_a_sum():
    """2048 + 1 in float16: lost within a sum's result, kept between results."""
    x = torch.ones(1, 1, 4, dtype=torch.float16)
    banks = torch.tensor([2048, 1, 1, 1], dtype=torch.float16).view(1, 1, 1, 1, 4)
    assert ops.pim_gemv(x, banks, 1, 4, 2).flatten().tolist() == [2052.0]  # 2051 lies between two numbers
    assert ops.pim_gemv(x, banks, 1, 4, 2, narrow_results=False).flatten().tolist() == [2051.0]
    assert ops.pim_gemv(x, banks, 1, 2, 2).flatten().tolist() == [2048.0, 2.0]


def test_a_tree_of_neighbours_by_hand():
    """1e8 - 1e8 cancels before 1 comes only if neighbours meet first."""
    x = torch.ones(1, 1, 4)
    banks = torch.tensor([1e8, -1e8, 1.0, 0.0]).view(1, 1, 1, 1, 4)
    assert ops.pim_gemv(x, banks, 1, 4, 4).item() == 1.0
    assert ops.pim_gemv(x, banks.view(1, 1, 1, 4).flip(-1)[:, None, :, :], 1, 4, 4).item() == 1.0
    apart = torch.tensor([1e8, 1.0, -1e8, 0.0]).view(1, 1, 1, 1, 4)
    assert ops.pim_gemv(x, apart, 1, 4, 4).item() == 0.0


@cpu_only("CPU tensors of float64")
def test_float64():
    x, banks = normal(1, 2, 20).double(), normal(1, 1, 2, 4, 16, seed=1).double()
    assert same_bits(ops.pim_gemv(x, banks, 3, 16, 4), reference.pim_gemv(x, banks, 3, 16, 4))
