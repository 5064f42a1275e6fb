"""``packed_linear``: both paths within bounds, exact where the arithmetic is, and independent of memory layout."""

from __future__ import annotations

import effops
import pytest
import torch
from backend import cpu_only
from effops import ops
from effops.reference.bounds import packed_linear_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, KINDS, normal, same_bits, values

pytestmark = pytest.mark.core

ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 40)
FEATURES = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 257)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    rows, inner, outer = (data.draw(st.sampled_from(sizes)) for sizes in (ROWS, FEATURES, FEATURES))
    lead = data.draw(st.sampled_from([(rows,), (1, rows), (rows, 1), ()] + [(2, rows // 2)] * (rows % 2 == 0)))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(KINDS))
    place = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)

    def drawn(*shape: int, seed: int) -> torch.Tensor:
        return data.draw(place)(values(*shape, dtype=DTYPES[dtype], seed=seed, kind=kind))

    first = data.draw(st.sampled_from(("nothing", "norm", "gated")))
    if first == "norm" and (kind == "subnormal" or inner == 0):
        first = "nothing"  # the bound of a norm knows neither
    if first == "gated" and kind in ("large", "spikes"):
        first = "nothing"  # three such factors overflow float16
    x = drawn(*lead, inner * (2 if first == "gated" else 1), seed=seed)
    w = drawn(outer, inner, seed=seed + 2)
    bias = drawn(outer, seed=seed + 4) if data.draw(st.booleans()) else None
    options = {"residual": drawn(*lead, outer, seed=seed + 6)} if data.draw(st.booleans()) else {}
    if first == "norm":
        options |= {"norm": drawn(inner, seed=seed + 8), "norm_eps": data.draw(st.sampled_from((1e-6, 1.0)))}
    if first == "gated":
        options |= {"gated": True}
    got = ops.packed_linear(x, w, bias, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert packed_linear_bound(x, w, bias, **options).worst(got) <= 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate_have_the_bits_of_their_ops(dtype, rows):
    for inner in (1, 8, 33, 100):
        w, norm = normal(75, inner, dtype=DTYPES[dtype]), normal(inner, dtype=DTYPES[dtype], seed=1)
        x, gated = (normal(rows, n * inner, dtype=DTYPES[dtype], seed=2) for n in (1, 2))
        bias, residual = normal(75, dtype=DTYPES[dtype], seed=3), normal(rows, 75, dtype=DTYPES[dtype], seed=4)
        for place in LAYOUTS.values():
            got = ops.packed_linear(place(x), w, bias, residual=residual, norm=place(norm), norm_eps=1e-3)
            apart = ops.packed_linear(ops.rms_norm(x, norm, 1e-3), w, bias, residual=residual)
            assert same_bits(got, apart)
            got = ops.packed_linear(place(gated), w, bias, residual=residual, gated=True)
            assert same_bits(got, ops.packed_linear(ops.silu_mul(gated), w, bias, residual=residual))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype, rows):
    """Small integers: every sum is exact, so every element, its bias and its residual show, one rounding apart."""
    generator = torch.Generator().manual_seed(rows)
    for inner in (1, 8, 33, 64, 100, 500):
        x, w, bias, residual = (
            torch.randint(-3, 4, shape, generator=generator).to(DTYPES[dtype])
            for shape in ((rows, inner), (75, inner), (75,), (rows, 75))
        )
        product = x.double() @ w.double().T
        assert torch.equal(ops.packed_linear(x, w), product.to(x.dtype))
        if rows <= 16:
            both = product + bias.double() + residual.double()
            assert torch.equal(ops.packed_linear(x, w, bias, residual=residual), both.to(x.dtype))
        else:  # GEMM path: the product with its bias is rounded before the residual comes
            first = (product + bias.double()).to(x.dtype).double() if dtype != "f16" else product + bias.double()
            got = ops.packed_linear(x, w, bias, residual=residual)
            assert torch.equal(got, (first + residual.double()).to(x.dtype))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_threads_do_not_matter(dtype, rows):
    x, w, bias, residual = (
        normal(*shape, dtype=DTYPES[dtype], seed=len(shape)) for shape in ((rows, 333), (777, 333), (777,), (rows, 777))
    )
    plain = ops.packed_linear(x, w, bias, residual=residual)
    for place in LAYOUTS.values():
        assert same_bits(ops.packed_linear(place(x), place(w), place(bias), residual=place(residual)), plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.packed_linear(x, w, bias, residual=residual), plain)


@cpu_only("plain weights are torch's on devices")
@pytest.mark.parametrize("inner", (333, 2500))  # longer rows may be taken in stretches
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_batch_does_not_matter(dtype, inner):
    """Up to 16 rows by nature, any number under batch_invariant."""
    x, w = normal(45, inner, dtype=DTYPES[dtype]), normal(77, inner, dtype=DTYPES[dtype], seed=1)
    rows = torch.cat([ops.packed_linear(x[i : i + 1], w) for i in range(45)])
    for count in range(17):
        assert same_bits(ops.packed_linear(x[:count], w), rows[:count])
    with effops.batch_invariant():
        for count in (1, 16, 17, 45):
            assert same_bits(ops.packed_linear(x[:count], w), rows[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_features_do_not_meet(dtype):
    """Cut anywhere, the weight's rows give the same bits: no piece reads a neighbour's."""
    x, w = normal(3, 100, dtype=DTYPES[dtype]), normal(200, 100, dtype=DTYPES[dtype], seed=1)
    whole = ops.packed_linear(x, w)
    for cut in (1, 5, 63, 64, 65, 199):
        assert same_bits(ops.packed_linear(x, w[:cut]), whole[:, :cut].contiguous())
        assert same_bits(ops.packed_linear(x, w[cut:]), whole[:, cut:].contiguous())


def test_packed_weights():
    w = normal(20, 30)
    for format, dtype in {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.items():
        packed = ops.pack_weight(w, format)
        x = normal(3, 30, dtype=dtype, seed=1)
        assert packed.shape == (20, 30) and packed.dequantize().dtype == dtype and packed.format == format
        assert same_bits(ops.packed_linear(x, packed), ops.packed_linear(x, w.to(dtype)))
    assert ops.pack_weight(w).data.data_ptr() == w.data_ptr(), "a weight in the format is held, not copied"
    with pytest.raises(ValueError, match=r"pack_weight: w: expected shape \[N, K\], got \[30\]"):
        ops.pack_weight(w[0])
    with pytest.raises(
        ValueError, match="pack_weight: format: expected one of f32, bf16, f16, int8, int4, fp8_e4m3, got int3"
    ):
        ops.pack_weight(w, "int3")
    with pytest.raises(ValueError, match=r"pack_weight: w: expected a floating dtype, got torch\.int32"):
        ops.pack_weight(w.int(), "f32")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_belongs(dtype, rows):
    """In its row of the input, in its feature of the weight; every other bit is as it was."""
    x, w = normal(rows, 100, dtype=DTYPES[dtype]), normal(70, 100, dtype=DTYPES[dtype], seed=1)
    plain = ops.packed_linear(x, w)
    for row, feature, inner in ((0, 0, 99), (rows - 1, 69, 0), (rows // 2, 64, 63)):
        bad_x, bad_w = x.clone(), w.clone()
        bad_x[row, inner], bad_w[feature, inner] = torch.nan, torch.nan
        for got, index in (
            (ops.packed_linear(bad_x, w), (row,)),
            (ops.packed_linear(x, bad_w), (slice(None), feature)),
        ):
            assert got[index].isnan().all()
            got[index] = plain[index]
            assert same_bits(got, plain)
