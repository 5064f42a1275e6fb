"""``grouped_mm`` and ``grouped_mm_weight_gradient``: within bounds for any load, exact on small integers, laws."""

from __future__ import annotations

from typing import Any

import effops
import pytest
import torch
from backend import NAME, sized
from effops import ops, reference
from effops.reference.moe_bounds import grouped_mm_bound, grouped_mm_weight_gradient_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies import experts
from strategies.experts import PLACES, offsets_of, poisoned
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.core

ON_BACKEND = {name: dtype for name, dtype in DTYPES.items() if NAME == "cpu" or name != "f64"}
DTYPE = pytest.mark.parametrize("dtype", ON_BACKEND)  # float64 products are the CPU's
ROWS = (0, 1, 2, 3, 5, 8, 13, 17, 40, 70)
FEATURES = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
KINDS = ("normal", "spikes", "tiny", "zeros")
SIZES = st.sampled_from(FEATURES if NAME != "simt" else FEATURES[:12])


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Multiples of 1/4 up to 2: products and short sums are exact in every dtype's compute type."""
    return (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)


def loop(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matmul for each group, in float64."""
    y = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        y[begin:end] = x[begin:end].double() @ w[e].double() + (0 if bias is None else bias[e].double())
        begin = end
    return y


@DTYPE
@given(data=st.data())
def test_any_call(dtype, data):
    groups, rows = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(ROWS))
    inner, outer = data.draw(SIZES), data.draw(SIZES)
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(KINDS))
    ends = data.draw(experts.offsets(groups, rows))
    x = values(rows, inner, dtype=DTYPES[dtype], seed=seed, kind=kind)
    w = values(groups, inner, outer, dtype=x.dtype, seed=seed + 2, kind=kind)
    sizes = {"in_sizes": data.draw(experts.sizes(groups, inner)), "out_sizes": data.draw(experts.sizes(groups, outer))}
    w = poisoned(poisoned(w, sizes["in_sizes"], 1), sizes["out_sizes"], 2)
    bias = values(groups, outer, dtype=x.dtype, seed=seed + 4, kind=kind) if data.draw(st.booleans()) else None
    placed = data.draw(PLACES)(w.mT).mT if data.draw(st.booleans()) else data.draw(PLACES)(w)
    given = {n: t if t is None else data.draw(PLACES)(t) for n, t in (("bias", bias), *sizes.items())}
    got = ops.grouped_mm(data.draw(PLACES)(x), placed, data.draw(PLACES)(ends), **given)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert grouped_mm_bound(x, w, ends, bias=bias, **sizes).worst(got) <= 1


@DTYPE
@given(data=st.data())
def test_any_weight_gradient(dtype, data):
    groups, rows = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(ROWS))
    inner, outer = data.draw(SIZES), data.draw(SIZES)
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(KINDS))
    ends = data.draw(experts.offsets(groups, rows))
    x, dy = (values(rows, n, dtype=DTYPES[dtype], seed=seed + n, kind=kind) for n in (inner, outer))
    sizes = {"in_sizes": data.draw(experts.sizes(groups, inner)), "out_sizes": data.draw(experts.sizes(groups, outer))}
    got = ops.grouped_mm_weight_gradient(data.draw(PLACES)(x), data.draw(PLACES)(dy), data.draw(PLACES)(ends), **sizes)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert grouped_mm_weight_gradient_bound(x, dy, ends, **sizes).worst(got) <= 1


@DTYPE
@pytest.mark.parametrize("load", [(3, 5, 1), (0, 9, 0), (0, 0, 0), (9, 0, 0), (50, 7, 0), (0, 3, 60), (2, 2, 2)])
def test_a_loop_of_matmuls(dtype, load):
    """Bit for bit where arithmetic is exact; rows left over are zero whatever the bias."""
    ends = offsets_of(list(load))
    for inner, outer in ((40, 24), (33, 65), (8, 1)):
        x = integers(sum(load) + 2, inner, dtype=DTYPES[dtype])
        w, bias = integers(3, inner, outer, dtype=x.dtype, seed=1), integers(3, outer, dtype=x.dtype, seed=2)
        for matrices in (w, w.mT.contiguous().mT):
            assert same_bits(ops.grouped_mm(x, matrices, ends), loop(x, w, ends).to(x.dtype) + 0)
            got = ops.grouped_mm(x, matrices, ends, bias=bias)
            assert same_bits(got, loop(x, w, ends, bias).to(x.dtype) + 0)
            assert (got[sum(load) :] == 0).all()
        gradient = ops.grouped_mm_weight_gradient(x, integers(x.shape[0], outer, dtype=x.dtype, seed=3), ends)
        expected = reference.grouped_mm_weight_gradient(
            x.double(), integers(x.shape[0], outer, dtype=x.dtype, seed=3).double(), ends
        )
        assert same_bits(gradient, expected.to(x.dtype) + 0)


@DTYPE
@pytest.mark.parametrize("load", [(3, 5), (20, 40), (130, 1)], ids=["few", "some", "many"])
def test_deeper_than_a_pipeline(dtype, load):
    """So many inputs that every stage of a device's copies is filled again, exact, for each shape of tile."""
    x, w = integers(sum(load), 333, dtype=DTYPES[dtype]), integers(2, 333, 20, dtype=DTYPES[dtype], seed=1)
    for matrices in (w, w.mT.contiguous().mT):
        y = ops.grouped_mm(x, matrices, offsets_of(list(load)))
        assert same_bits(y, loop(x, w, offsets_of(list(load))).to(x.dtype) + 0)


@DTYPE
def test_one_group_is_a_matmul(dtype):
    for rows in (1, 2, 5, 16, 47, 48, 49, sized(200, 60)):
        x, w = normal(rows, 70, dtype=DTYPES[dtype], seed=rows), normal(1, 70, 90, dtype=DTYPES[dtype], seed=1)
        got = ops.grouped_mm(x, w, int32(rows))
        assert grouped_mm_bound(x, w, int32(rows)).worst(got) <= 1
        assert grouped_mm_bound(x, w, int32(rows)).worst(ops.grouped_mm(x, w.mT.contiguous().mT, int32(rows))) <= 1


@DTYPE
def test_permuted_groups(dtype):
    """Groups in another order, with their rows: the same rows, in that order, with the same bits."""
    load, order = [4, 0, 9, 1], [2, 3, 0, 1]
    x, w = normal(14, 50, dtype=DTYPES[dtype]), normal(4, 50, 36, dtype=DTYPES[dtype], seed=1)
    parts = x.split(load)
    moved = ops.grouped_mm(torch.cat([parts[e] for e in order]), w[order], offsets_of([load[e] for e in order]))
    expected = ops.grouped_mm(x, w, offsets_of(load)).split(load)
    assert same_bits(moved, torch.cat([expected[e] for e in order]))


@DTYPE
def test_rows_of_a_group_do_not_see_each_other(dtype):
    """Other rows, other groups: the same bits wherever the number of rows chooses the same loop; under
    batch_invariant whatever it is."""
    x, w = normal(80, 60, dtype=DTYPES[dtype]), normal(3, 60, 44, dtype=DTYPES[dtype], seed=1)
    ends = int32(20, 20, 80)
    plain = ops.grouped_mm(x, w, ends)
    other = x.clone()
    other[3], other[70] = 1000.0, 0.0
    rest = torch.ones(80, dtype=torch.bool)
    rest[[3, 70]] = False
    assert same_bits(ops.grouped_mm(other, w, ends)[rest], plain[rest])
    assert same_bits(ops.grouped_mm(x[:20], w[:1], ends[:1]), plain[:20])
    with effops.batch_invariant():
        pinned = ops.grouped_mm(x, w, ends)
        for row in (0, 19, 20, 79):
            load = [1, 0, 0] if row < 20 else [0, 0, 1]
            assert same_bits(ops.grouped_mm(x[row : row + 1], w, offsets_of(load)), pinned[row : row + 1])
    assert grouped_mm_bound(x, w, ends).worst(pinned) <= 1


@DTYPE
def test_sizes(dtype):
    """Features that a group lacks hold NaN and are not read; what a group has, it computes as if alone."""
    x, w = normal(30, 40, dtype=DTYPES[dtype]), normal(4, 40, 50, dtype=DTYPES[dtype], seed=1)
    ins, outs, ends = int32(40, 17, 0, 33), int32(50, 0, 21, 32), int32(10, 12, 20, 29)
    flawed = poisoned(poisoned(w, ins, 1), outs, 2)
    beyond = x.clone()
    for e, (begin, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        beyond[begin:end, ins[e] :] = torch.nan
    got = ops.grouped_mm(beyond, flawed, ends, in_sizes=ins, out_sizes=outs)
    assert grouped_mm_bound(beyond, flawed, ends, in_sizes=ins, out_sizes=outs).worst(got) <= 1
    assert (got[10:12] == 0).all() and (got[20:29, 32:] == 0).all() and (got[29] == 0).all() and (got[12:20] == 0).all()
    dw = ops.grouped_mm_weight_gradient(beyond, got, ends, in_sizes=ins, out_sizes=outs)
    assert dw.isfinite().all() and (dw[1] == 0).all() and (dw[3, 33:] == 0).all() and (dw[3, :, 32:] == 0).all()


@DTYPE
def test_nan_stays_where_it_belongs(dtype):
    """In its row of x; in its group's feature of w; rows past the last group read nothing."""
    x, w, ends = normal(60, 33, dtype=DTYPES[dtype]), normal(3, 33, 40, dtype=DTYPES[dtype], seed=1), int32(3, 55, 58)
    plain = ops.grouped_mm(x, w, ends)
    bad_x, bad_w = x.clone(), w.clone()
    bad_x[2, 32] = bad_x[54, 0] = bad_x[59] = torch.nan
    bad_w[1, 32, 39] = torch.nan
    got = ops.grouped_mm(bad_x, w, ends)
    assert got[[2, 54]].isnan().all()
    got[[2, 54]] = plain[[2, 54]]
    assert same_bits(got, plain)
    for matrices in (bad_w, bad_w.mT.contiguous().mT):
        got = ops.grouped_mm(x, matrices, ends)
        assert got[3:55, 39].isnan().all()
        got[3:55, 39] = plain[3:55, 39]
        assert got.isfinite().all()
        assert grouped_mm_bound(x, w, ends).worst(got) <= 1


@DTYPE
def test_layout_and_threads_do_not_matter(dtype):
    rows, wide = sized(300, 20), sized(200, 40)
    x, w = normal(rows, 60, dtype=DTYPES[dtype]), normal(5, 60, wide, dtype=DTYPES[dtype], seed=1)
    dy, ends = normal(rows, wide, dtype=x.dtype, seed=2), offsets_of([rows // 2, 0, 3, rows // 4, 1])
    y, dw = ops.grouped_mm(x, w, ends), ops.grouped_mm_weight_gradient(x, dy, ends)
    for place in LAYOUTS.values():
        assert same_bits(ops.grouped_mm(place(x), w, place(ends)), y)
        assert same_bits(ops.grouped_mm_weight_gradient(place(x), place(dy), ends), dw)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.grouped_mm(x, w, ends), y)
        assert same_bits(ops.grouped_mm_weight_gradient(x, dy, ends), dw)


@pytest.mark.parametrize("shape", [(0, 8, 8), (5, 0, 8), (5, 8, 0), (0, 0, 0)])
def test_nothing(shape: Any):
    """No rows, no inputs, no outputs, no groups: zeros of the right shape, or the bias."""
    rows, inner, outer = shape
    for groups in (1, 3):
        x, w, bias = torch.ones(rows, inner), torch.ones(groups, inner, outer), torch.ones(groups, outer)
        ends = offsets_of([rows, 0, 0][:groups])
        assert ops.grouped_mm(x, w, ends).equal(torch.full((rows, outer), float(inner)))
        assert ops.grouped_mm(x, w, ends, bias=bias).equal(torch.full((rows, outer), inner + 1.0))
        dw = ops.grouped_mm_weight_gradient(x, torch.ones(rows, outer), ends)
        assert dw.shape == (groups, inner, outer) and (dw[1:] == 0).all() and (dw[0] == rows).all()
    none = torch.ones(0, inner, outer), torch.empty(0, dtype=torch.int32)
    assert ops.grouped_mm(torch.ones(rows, inner), *none).equal(torch.zeros(rows, outer))


def test_batch_invariant_holds_for_its_block():
    """Also when it ends in an error; a plain call holds until the next."""
    from effops.ops._invariance import is_batch_invariant

    assert not is_batch_invariant()
    with pytest.raises(KeyError), effops.batch_invariant():
        with effops.batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
        raise KeyError
    assert not is_batch_invariant()
    effops.batch_invariant(True)
    assert is_batch_invariant()
    effops.batch_invariant(False)
    assert not is_batch_invariant()
