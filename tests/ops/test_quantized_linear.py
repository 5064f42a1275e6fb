"""``packed_linear`` with weights of few bits: within its bound, exact where the arithmetic is, features apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effops import ops, reference
from effops.reference.bounds import packed_linear_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, normal, same_bits, values

pytestmark = pytest.mark.core

FORMATS = ("int8", "int4")
FLOATS = {name: dtype for name, dtype in DTYPES.items() if name != "f64"}
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 40)
FEATURES = (0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 100)
# Inputs and the size of a group of them.
GROUPS = ((0, None), (1, None), (7, None), (8, 8), (13, None), (24, 8), (33, None), (64, 32), (128, None), (240, 40))


def scales_of(packed: ops.PackedWeight) -> torch.Tensor:
    """Of each weight."""
    _, scales, _ = packed.numbers()
    return scales.repeat_interleave(packed.shape[1] // max(1, scales.shape[1]), 1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_any_call(dtype, format, data):
    rows, outer = (data.draw(st.sampled_from(sizes)) for sizes in (ROWS, FEATURES))
    inner, group = data.draw(st.sampled_from(GROUPS))
    lead = data.draw(st.sampled_from([(rows,), (1, rows), (rows, 1), ()] + [(2, rows // 2)] * (rows % 2 == 0)))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(("normal", "spikes", "tiny", "zeros")))
    place = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)

    def drawn(*shape: int, seed: int) -> torch.Tensor:
        return data.draw(place)(values(*shape, dtype=FLOATS[dtype], seed=seed, kind=kind))

    first = data.draw(st.sampled_from(("nothing", "norm", "gated")))
    if first != "nothing" and (kind != "normal" or inner == 0):
        first = "nothing"
    w = normal(outer, inner, seed=seed + 2)
    packed = ops.pack_weight(w, format, group_size=group, symmetric=data.draw(st.booleans()))
    bias = drawn(outer, seed=seed + 4) if data.draw(st.booleans()) else None
    options = {"residual": drawn(*lead, outer, seed=seed + 6)} if data.draw(st.booleans()) else {}
    if first == "norm":
        options |= {"norm": drawn(inner, seed=seed + 8), "norm_eps": data.draw(st.sampled_from((1e-6, 1.0)))}
    if first == "gated":
        options |= {"gated": True}
    x = drawn(*lead, inner * (2 if first == "gated" else 1), seed=seed)
    got = ops.packed_linear(x, packed, bias, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert packed_linear_bound(x, packed, bias, **options).worst(got) <= 1


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("inputs", "group"), GROUPS)
def test_within_half_a_step_and_what_the_reference_says(format, symmetric, inputs, group):
    for kind in ("normal", "spikes", "tiny", "zeros"):
        w = values(40, inputs, dtype=torch.float32, seed=inputs, kind=kind)
        w[:3] = w[:3].abs()
        packed = ops.pack_weight(w, format, group_size=group, symmetric=symmetric)
        got, step = packed.dequantize(), scales_of(packed)
        assert ((got - w).abs() <= step * (0.5 + 2**-16)).all()
        expected = reference.pack_weight(w, format, group_size=group, symmetric=symmetric)
        assert ((got - expected).abs() <= 2**-22 * expected.abs()).all()
        numbers, _, zeros = packed.numbers()
        assert torch.equal(zeros, zeros.round()) and packed.shape == (40, inputs)
        least, most = (0, 15) if format == "int4" else (-128, 127)
        assert not numbers.numel() or (numbers.min() >= least and numbers.max() <= most)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_numbers_are_exact(dtype, format):
    """Steps that are powers of two and small integers: every sum is exact, whatever its order."""
    generator = torch.Generator().manual_seed(0)
    for rows in ROWS:
        numbers = torch.randint(-3, 4, (75, 6, 16), generator=generator).float()
        scales = 2.0 ** torch.randint(-3, 4, (75, 6), generator=generator)
        x = torch.randint(-3, 4, (rows, 96), generator=generator).to(FLOATS[dtype])
        zeros = torch.randint(-2, 3, (75, 6), generator=generator).float()
        for zero in (None, zeros):
            middle = (8 if format == "int4" else 0) + (0 if zero is None else zero[..., None])
            packed = ops.packed_weight.from_numbers(
                numbers + middle, scales, None if zero is None else middle[..., 0], format
            )
            exact = x.double() @ packed.dequantize().double().T
            assert torch.equal(packed.dequantize(), (numbers * scales[..., None]).flatten(1))
            assert torch.equal(ops.packed_linear(x, packed), exact.to(x.dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_and_gate_have_the_bits_of_their_ops(dtype, format):
    packed, norm = ops.pack_weight(normal(75, 24), format, group_size=8), normal(24, dtype=FLOATS[dtype], seed=1)
    for rows in ROWS:
        x, gated = (normal(rows, n * 24, dtype=FLOATS[dtype], seed=2) for n in (1, 2))
        bias, residual = normal(75, dtype=FLOATS[dtype], seed=3), normal(rows, 75, dtype=FLOATS[dtype], seed=4)
        got = ops.packed_linear(x, packed, bias, residual=residual, norm=norm, norm_eps=1e-3)
        assert same_bits(got, ops.packed_linear(ops.rms_norm(x, norm, 1e-3), packed, bias, residual=residual))
        got = ops.packed_linear(gated, packed, bias, residual=residual, gated=True)
        assert same_bits(got, ops.packed_linear(ops.silu_mul(gated), packed, bias, residual=residual))


@pytest.mark.parametrize("rows", (1, 2, 3, 5, 8, 16))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layout_threads_and_neighbours_do_not_matter(dtype, format, rows):
    x, w = normal(rows, 320, dtype=FLOATS[dtype]), normal(777, 320, seed=1)
    packed = ops.pack_weight(w, format, group_size=64)
    plain = ops.packed_linear(x, packed)
    for place in LAYOUTS.values():
        assert same_bits(ops.packed_linear(place(x), packed), plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.packed_linear(x, packed), plain)
    order = torch.randperm(777, generator=torch.Generator().manual_seed(0))
    moved = ops.packed_linear(x, ops.pack_weight(w[order], format, group_size=64))
    assert same_bits(moved, plain[:, order].contiguous())
    other = w.clone()
    other[:, 64:128] = torch.linspace(-9, 9, 64)  # x is zero there
    x[:, 64:128] = 0
    changed = ops.packed_linear(x, ops.pack_weight(other, format, group_size=64))
    assert same_bits(changed, ops.packed_linear(x, packed))


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("format", ("f32", "bf16", "f16", *FORMATS))
def test_through_a_file(format, symmetric, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    options = {"symmetric": symmetric, "group_size": 16} if format in FORMATS else {}
    packed = ops.pack_weight(normal(50, 48), format, **options)
    save_file(packed.tensors("layer."), str(tmp_path / "w.safetensors"))
    back = ops.PackedWeight.from_tensors(load_file(str(tmp_path / "w.safetensors")), "layer.")
    assert back.format == packed.format and back.shape == packed.shape and back.group_size == packed.group_size
    for name in ("data", "scales", "zeros"):
        a, b = getattr(packed, name), getattr(back, name)
        assert (a is None and b is None) or same_bits(a, b)


def test_flawed_files_are_named():
    tensors = ops.pack_weight(normal(50, 48), "int4", group_size=16, symmetric=False).tensors()
    for name in ("data", "scales", "about"):
        with pytest.raises(ValueError, match=f"PackedWeight: {name}: expected"):
            ops.PackedWeight.from_tensors({n: t for n, t in tensors.items() if n != name})
    for name in ("data", "scales", "zeros"):
        for flawed in (tensors[name][:1], tensors[name][:, :2], tensors[name].double()):
            with pytest.raises(ValueError, match=r"PackedWeight: (data|scales|zeros): expected"):
                ops.PackedWeight.from_tensors(tensors | {name: flawed})
    for about in ([50, 48, 5], [50, 56, 4], [500, 48, 4], [50, 50, 4]):
        with pytest.raises(ValueError, match="PackedWeight: "):
            ops.PackedWeight.from_tensors(tensors | {"about": torch.tensor(about)})


def test_bad_weights_are_refused():
    w = normal(6, 48)
    for size in (0, -8, 5, 32, 12):
        with pytest.raises(ValueError, match="pack_weight: group_size: expected a multiple of 8 that divides K = 48"):
            ops.pack_weight(w, "int4", group_size=size)
    with pytest.raises(ValueError, match="pack_weight: group_size: expected None beside bf16"):
        ops.pack_weight(w, "bf16", group_size=8)
    with pytest.raises(ValueError, match="pack_weight: format: expected one of"):
        ops.pack_weight(w, "int3")
    for bad in (torch.nan, torch.inf):
        w[1, 2] = bad
        with pytest.raises(ValueError, match="pack_weight: w: expected finite values"):
            ops.pack_weight(w, "int8")


def test_not_numbers():
    """A row with a NaN or an infinity is that one's alone."""
    packed = ops.pack_weight(normal(33, 48), "int4", group_size=16)
    x = normal(3, 48)
    plain = ops.packed_linear(x, packed)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        got = ops.packed_linear(x, packed)
        assert not got[1].isfinite().any() and same_bits(got[0], plain[0]) and same_bits(got[2], plain[2])


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"bits": 3}, "bits"), ({"features": -1}, "features"), ({"features": 33}, "scales"), ({"bits": 8}, "data"),
        ({"x": normal(3, 12)}, "scales"), ({"x": normal(3, 24)}, "scales"), ({"x": normal(3, 16).double()}, "x"),
        ({"scales": normal(1, 2, 32).double()}, "scales"), ({"zeros": normal(1, 1, 32)}, "zeros"),
        ({"data": torch.zeros(1, 3, 32, dtype=torch.int32)}, "data"), ({"bias": normal(6)}, "bias"),
        ({"scales": normal(1, 0, 32)}, "scales"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(changed, argument):
    packed = ops.pack_weight(normal(5, 16), "int4", group_size=8, symmetric=False)
    call = {"x": normal(3, 16), "data": packed.data, "scales": packed.scales, "zeros": packed.zeros, "features": 5}
    with pytest.raises(RuntimeError, match=f"quantized_linear: {argument}: expected"):
        torch.ops.effops.quantized_linear(**(call | {"bits": 4} | changed))
