"""``packed_linear`` with weights of few bits: within its bound, exact where the arithmetic is, features apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import effops
import pytest
import torch
from backend import NAME, cpu_only
from effops import ops, reference
from effops.reference.bounds import packed_linear_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, normal, same_bits, values

pytestmark = pytest.mark.core

FORMATS = ("int8", "int4", "fp8_e4m3")
WITH_ZEROS = [
    (format, symmetric) for format in FORMATS for symmetric in (True, False) if format != "fp8_e4m3" or symmetric
]
each_kind = pytest.mark.parametrize(("format", "symmetric"), WITH_ZEROS)
FLOATS = {name: dtype for name, dtype in DTYPES.items() if name != "f64"}
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 40)
FEATURES = (0, 1, 7, 8, 31, 32, 33, 63, 64, 65, 100)
# Inputs and the size of a group of them.
GROUPS = ((0, None), (1, None), (7, None), (8, 8), (13, None), (24, 8), (33, None), (64, 32), (128, None), (240, 40))


def packed_rows() -> torch.Tensor:
    return ops.pack_weight(normal(5, 16), "int4", group_size=8, symmetric=False).data


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
    packed = ops.pack_weight(w, format, group_size=group, symmetric=format == "fp8_e4m3" or data.draw(st.booleans()))
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


@each_kind
@pytest.mark.parametrize(("inputs", "group"), GROUPS)
def test_within_half_a_step_and_what_the_reference_says(format, symmetric, inputs, group):
    for kind in ("normal", "spikes", "tiny", "zeros"):
        w = values(40, inputs, dtype=torch.float32, seed=inputs, kind=kind)
        w[:3] = w[:3].abs()
        packed = ops.pack_weight(w, format, group_size=group, symmetric=symmetric)
        got, step = packed.dequantize(), scales_of(packed)
        numbers, _, zeros = packed.numbers()
        # Float8 numbers have three digits after the first one, and steps of 2^-9 at least.
        half = (numbers.abs() / 16).clamp(min=2.0**-10) if format == "fp8_e4m3" else 0.5
        assert ((got - w).abs() <= step * (half + 2**-16)).all()
        expected = reference.pack_weight(w, format, group_size=group, symmetric=symmetric)
        assert ((got - expected).abs() <= 2**-22 * expected.abs()).all()
        assert torch.equal(zeros, zeros.round()) and packed.shape == (40, inputs)
        least, most = {"int4": (0, 15), "int8": (-128, 127), "fp8_e4m3": (-448, 448)}[format]
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
        for zero in (None, zeros) if format != "fp8_e4m3" else (None,):
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


@pytest.mark.parametrize(("format", "symmetric"), [("f32", True), ("bf16", True), ("f16", True), *WITH_ZEROS])
def test_through_a_file(format, symmetric, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    options = {"symmetric": symmetric, "group_size": 16} if format in FORMATS else {}
    packed = ops.pack_weight(normal(50, 48), format, **options)
    save_file(packed.tensors("layer."), str(tmp_path / "w.safetensors"))
    back = ops.PackedWeight.from_tensors(load_file(str(tmp_path / "w.safetensors")), "layer.")
    assert back.format == packed.format and back.shape == packed.shape and back.group_size == packed.group_size
    assert back.data.dtype == packed.data.dtype and same_bits(
        back.data.view(torch.uint8), packed.data.view(torch.uint8)
    )


def test_flawed_files_are_named():
    tensors = ops.pack_weight(normal(50, 48), "int4", group_size=16, symmetric=False).tensors()
    for name in ("data", "about"):
        with pytest.raises(ValueError, match=f"PackedWeight: {name}: expected"):
            ops.PackedWeight.from_tensors({n: t for n, t in tensors.items() if n != name})
    data = tensors["data"]
    for flawed in (data[:1], data[:, :-4], data[:, :-1], data.double(), data[None], data.view(torch.int8)):
        with pytest.raises(ValueError, match=r"PackedWeight: data: expected"):
            ops.PackedWeight.from_tensors(tensors | {"data": flawed})
    for about in ([50, 56, 16], [500, 48, 16], [50, 0, 0], [50, 48, 8], [50, 48], [50.0, 48.0, 16.0]):
        with pytest.raises(ValueError, match="PackedWeight: "):
            ops.PackedWeight.from_tensors(tensors | {"about": torch.tensor(about)})
    for order in (torch.zeros(48).long(), torch.arange(47), torch.arange(48).int()):
        with pytest.raises(ValueError, match="PackedWeight: order: expected"):
            ops.PackedWeight.from_tensors(tensors | {"order": order})


def test_bad_weights_are_refused():
    w = normal(6, 48)
    for size in (0, -8, 5, 32, 12):
        with pytest.raises(ValueError, match="pack_weight: group_size: expected a multiple of 8 that divides K = 48"):
            ops.pack_weight(w, "int4", group_size=size)
    with pytest.raises(ValueError, match="pack_weight: group_size: expected None beside bf16"):
        ops.pack_weight(w, "bf16", group_size=8)
    with pytest.raises(ValueError, match="pack_weight: format: expected one of"):
        ops.pack_weight(w, "int3")
    with pytest.raises(ValueError, match="pack_weight: symmetric: expected True beside fp8_e4m3"):
        ops.pack_weight(w, "fp8_e4m3", symmetric=False)
    with pytest.raises(ValueError, match="from_numbers: zeros: expected values from 0 to 127 for int4"):
        ops.packed_weight.from_numbers(torch.zeros(2, 1, 8), torch.ones(2, 1), torch.full((2, 1), 128.0), "int4")
    with pytest.raises(ValueError, match="from_numbers: zeros: expected values from -128 to 127 for int8"):
        ops.packed_weight.from_numbers(torch.zeros(2, 1, 8), torch.ones(2, 1), torch.full((2, 1), 128.0), "int8")
    for bad in (torch.nan, torch.inf):
        w[1, 2] = bad
        with pytest.raises(ValueError, match="pack_weight: w: expected finite values"):
            ops.pack_weight(w, "int8")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_batch_does_not_matter(format, dtype):
    """Under batch_invariant; with x in int8, whose sums are exact, anyway."""
    x, packed = normal(37, 768, dtype=FLOATS[dtype]), ops.pack_weight(normal(77, 768, seed=1), format)
    with effops.batch_invariant():
        rows = torch.cat([ops.packed_linear(x[i : i + 1], packed) for i in range(len(x))])
        for count in (2, 3, 5, 7, 8, 9, 17, 37):
            assert same_bits(ops.packed_linear(x[:count], packed), rows[:count])
    if NAME == "cpu" and format != "fp8_e4m3":
        whole = ops.packed_linear(x, packed, activation="int8")
        for i in range(len(x)):
            assert same_bits(ops.packed_linear(x[i : i + 1], packed, activation="int8"), whole[i : i + 1])


def test_not_numbers():
    """A row with a NaN or an infinity is that one's alone."""
    for format, activation in (("int4", None), ("int8", None), ("fp8_e4m3", None), ("int4", "int8"), ("int8", "int8")):
        if activation is None or NAME == "cpu":
            check_not_numbers(ops.pack_weight(normal(33, 48), format, group_size=16), activation)


def check_not_numbers(packed: ops.PackedWeight, activation: str | None) -> None:
    x = normal(3, 48)
    plain = ops.packed_linear(x, packed, activation=activation)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        got = ops.packed_linear(x, packed, activation=activation)
        assert not got[1].isfinite().any() and same_bits(got[0], plain[0]) and same_bits(got[2], plain[2])


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_of_a_format(format):
    """Each of its numbers at each place of a word, against what it stands for."""
    if format == "fp8_e4m3":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        every = every[every.isfinite()]
    else:
        every = torch.arange(0, 16) if format == "int4" else torch.arange(-128, 128)
    numbers = torch.stack([every.roll(i) for i in range(40)], 1).float()[:, None]
    packed = ops.packed_weight.from_numbers(numbers, torch.ones(len(every), 1), torch.zeros(len(every), 1), format)
    assert torch.equal(packed.numbers()[0], numbers[:, 0])
    assert torch.equal(ops.packed_linear(torch.eye(40), packed), numbers[:, 0].T.contiguous())


@pytest.mark.parametrize("format", ("int8", "int4"))
@pytest.mark.parametrize("dtype", FLOATS)
@cpu_only("activations in int8 are the CPU's")
@given(data=st.data())
def test_activations_in_int8(dtype, format, data):
    rows, outer = (data.draw(st.sampled_from(sizes)) for sizes in (ROWS, FEATURES))
    inner, group = data.draw(st.sampled_from(GROUPS))
    kind, place = data.draw(st.sampled_from(("normal", "spikes", "zeros"))), data.draw(st.sampled_from(list(LAYOUTS)))
    x = LAYOUTS[place](values(rows, inner, dtype=FLOATS[dtype], seed=inner, kind=kind))
    packed = ops.pack_weight(normal(outer, inner), format, group_size=group, symmetric=data.draw(st.booleans()))
    bias = normal(outer, dtype=x.dtype, seed=3) if data.draw(st.booleans()) else None
    got = ops.packed_linear(x, packed, bias, activation="int8")
    assert packed_linear_bound(x, packed, bias, activation="int8").worst(got) <= 1
    expected = reference.packed_linear(x, packed, bias, activation="int8")
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("format", ("int8", "int4"))
@cpu_only("activations in int8 are the CPU's")
def test_integers_are_exact(format):
    """Rows whose largest value is 127 are their own numbers: results are integers, at the ends of every number too."""
    ends = torch.tensor([0, 15] if format == "int4" else [-128, 127])
    for rows in (1, 2, 4, 8):
        x = torch.randint(-127, 128, (rows, 64), generator=torch.Generator().manual_seed(rows)).float()
        x[:, ::16] = 127
        x[:, 1::16] = -127
        for pick in range(2):
            numbers = ends[(torch.arange(64) // 2 + torch.arange(40)[:, None] + pick) % 2].float()[:, None]
            packed = ops.packed_weight.from_numbers(numbers, torch.ones(40, 1), torch.zeros(40, 1), format)
            got = ops.packed_linear(x, packed, activation="int8")
            assert torch.equal(got, (x.double() @ numbers[:, 0].double().T).float())


@cpu_only("activations in int8 are the CPU's")
def test_norm_and_gate_before_int8():
    packed, norm = ops.pack_weight(normal(75, 24), "int4", group_size=8), normal(24, seed=1)
    for rows in (1, 3, 9):
        x, gated = (normal(rows, n * 24, seed=2) for n in (1, 2))
        got = ops.packed_linear(x, packed, norm=norm, activation="int8")
        assert same_bits(got, ops.packed_linear(ops.rms_norm(x, norm, 1e-6), packed, activation="int8"))
        got = ops.packed_linear(gated, packed, gated=True, activation="int8")
        assert same_bits(got, ops.packed_linear(ops.silu_mul(gated), packed, activation="int8"))
    says = "packed_linear: int8_activation: expected False but beside int8 and int4"
    for rows, weight in ((2, ops.pack_weight(normal(5, 24), "fp8_e4m3")), (2, normal(5, 24)), (64, normal(5, 24))):
        with pytest.raises(RuntimeError, match=says):
            ops.packed_linear(normal(rows, 24), weight, activation="int8")
    with pytest.raises(ValueError, match="packed_linear: activation: expected None or int8, got 'int4'"):
        ops.packed_linear(normal(2, 24), packed, activation="int4")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", (1, 3, 20))
def test_opcheck(format, rows):
    packed = ops.pack_weight(normal(35, 24), format, group_size=8)
    call = {"bias": normal(35, seed=2), "residual": normal(rows, 35, seed=3), "norm": normal(24, seed=4)}
    checks = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    if format != "fp8_e4m3":  # whether arguments are changed torch cannot say of float8
        checks.append("test_schema")
    arguments = (normal(rows, 24, seed=5), packed.data)
    torch.library.opcheck(torch.ops.effops.packed_linear.default, arguments, call, test_utils=checks)


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"x": normal(3, 12)}, "weight"), ({"x": normal(3, 40)}, "weight"), ({"x": normal(3, 16).double()}, "x"),
        ({"x": normal(3, 0)}, "weight"), ({"bias": normal(6)}, "bias"), ({"weight": packed_rows()[:, :-8]}, "weight"),
        ({"weight": packed_rows()[:, :-3]}, "weight"), ({"weight": packed_rows()[:, ::2]}, "weight"),
        ({"weight": packed_rows()[::2]}, "weight"), ({"weight": packed_rows()[None]}, "weight"),
        ({"weight": packed_rows().view(torch.int8)}, "weight"), ({"weight": packed_rows().to("meta")}, "weight"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(changed, argument):
    call = {"x": normal(3, 16), "weight": packed_rows()}
    weight = ops.pack_weight(normal(5, 16), "int4")
    for order in (None, torch.arange(16).flip(0)):
        with pytest.raises(RuntimeError, match=r"packed_linear: x: expected shape \[\.\.\., 16\], got \[3, 24\]"):
            ops.packed_linear(normal(3, 24), replace(weight, order=order))
    torch.ops.effops.packed_linear(**call)
    with pytest.raises(RuntimeError, match=f"packed_linear: {argument}: expected"):
        torch.ops.effops.packed_linear(**(call | changed))
