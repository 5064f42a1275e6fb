"""``fused_experts`` with weights in few bits and groups: within its bound, features apart, and rows that do not depend
on their neighbours where that is asked for."""

from __future__ import annotations

from typing import Any

import effops
import pytest
import torch
from effops import ops
from effops.ops import PackedExperts
from effops.reference.moe_bounds import fused_experts_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies import experts
from strategies.experts import PLACES, layer_of, weights_of
from strategies.values import DTYPES, normal, same_bits

pytestmark = pytest.mark.core

FLOATS = {name: dtype for name, dtype in DTYPES.items() if name != "f64"}
# Formats and whether they are symmetric. int8 of whole rows is another form, see test_fused_experts.
FORMATS = (("int4", True), ("int4", False), ("int8", False), ("fp8_e4m3", True))
each_format = pytest.mark.parametrize(("format", "symmetric"), FORMATS)
DTYPE = pytest.mark.parametrize("dtype", FLOATS)
Layer = tuple[PackedExperts, PackedExperts]


def packed(layer: dict[str, Any], format: str, symmetric: bool, group: int | None = None, **options: Any) -> Layer:
    return ops.pack_expert_layer(
        layer["w_gate_up"], layer["w_down"], format, group_size=group, symmetric=symmetric, **options
    )


def bound_of(x, form: Layer, call: dict[str, Any]):
    weights = {"w_gate_up": form[0].dequantize(), "w_down": form[1].dequantize()}
    return fused_experts_bound(x, **weights, sizes=(form[0].sizes(), form[1].sizes()), **call)


@each_format
@DTYPE
@given(data=st.data())
def test_any_call(dtype, format, symmetric, data):
    count, tokens, k = (
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from((0, 1, 3, 9, 30))),
        data.draw(st.integers(0, 3)),
    )
    dim, inner = (data.draw(st.sampled_from((1, 7, 8, 16, 17, 33, 64, 72))) for _ in range(2))
    group = 8 if dim % 8 == inner % 8 == 0 and data.draw(st.booleans()) else None
    gated, interleaved, biased = (data.draw(st.booleans()) for _ in range(3))
    layer = layer_of(count, dim, inner, FLOATS[dtype], gated, biased, data.draw(st.integers(0, 99)))
    form = packed(layer, format, symmetric, group, interleaved=gated and interleaved)
    x, ids = normal(tokens, dim, dtype=FLOATS[dtype]), data.draw(experts.choices(tokens, k, count))
    call = {"weights": weights_of(tokens, k, x.dtype), "ids": ids} | {n: b for n, b in layer.items() if "bias" in n}
    call["activation"] = data.draw(st.sampled_from(("silu", "gelu", "relu2") + ("swiglu_oai",) * gated))
    got = ops.fused_experts(data.draw(PLACES)(x), *form, **call)
    assert got.dtype == x.dtype and bound_of(x, form, call).worst(got) <= 1


@each_format
@pytest.mark.parametrize("gated", (True, False))
def test_what_is_packed_is_each_feature_s_own(format, symmetric, gated):
    w = normal(3, 70, 48)
    form = ops.pack_experts(w, format, gated=gated, group_size=16, symmetric=symmetric)
    assert form.shape == (3, 70, 48) and form.in_few_bits and form.nbytes < w.nbytes / 2
    for e in range(3):
        own = ops.pack_weight(w[e], format, group_size=16, symmetric=symmetric)
        assert torch.equal(form.dequantize()[e], own.dequantize())


@each_format
@DTYPE
def test_rows_alone_or_together(dtype, format, symmetric):
    """In batch-invariant mode; and experts that no token chose are not read."""
    layer = layer_of(4, 48, 40, FLOATS[dtype], True, True)
    form = packed(layer, format, symmetric)
    form[1].data[3] = form[0].data[3] = torch.full((), 255, dtype=torch.uint8).view(form[0].data.dtype)
    x, ids = normal(40, 48, dtype=FLOATS[dtype]), torch.arange(80, dtype=torch.int32).view(40, 2) % 3
    weights, biases = weights_of(40, 2, x.dtype), {n: b for n, b in layer.items() if "bias" in n}
    with effops.batch_invariant():
        whole = ops.fused_experts(x, *form, weights, ids, **biases)
        for part in (slice(0, 1), slice(5, 8), slice(20, 40)):
            some = ops.fused_experts(x[part], *form, weights[part], ids[part], **biases)
            assert same_bits(some, whole[part].contiguous())
    assert whole.isfinite().all()


@each_format
def test_threads_do_not_matter(format, symmetric):
    layer = layer_of(3, 64, 96, torch.float32, True, False)
    form, x = packed(layer, format, symmetric), normal(19, 64)
    call = {"weights": weights_of(19, 2, x.dtype), "ids": torch.arange(38, dtype=torch.int32).view(19, 2) % 3}
    torch.set_num_threads(1)
    alone = ops.fused_experts(x, *form, **call)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.fused_experts(x, *form, **call), alone)


def test_bad_calls_are_refused():
    layer = layer_of(3, 48, 40, torch.float32, True, False)
    form, plain = packed(layer, "int4", True), (layer["w_gate_up"], layer["w_down"])
    rest = {
        "weights": weights_of(5, 2, torch.float32),
        "ids": torch.zeros(5, 2, dtype=torch.int32),
        "packed_features": 40,
    }
    call: dict[str, Any] = {"x": normal(5, 48), "w_gate_up": form[0].data, "w_down": form[1].data} | rest
    op = torch.ops.effops.fused_experts.default
    op(**call)
    up, down = form[0].data, form[1].data
    for name, bad in [
        ("w_gate_up", up[:2]), ("w_gate_up", up[:, :-1]), ("w_gate_up", up[..., :-8]), ("w_gate_up", up[..., None]),
        ("w_down", down[:, :-32]), ("w_down", down[..., 1:]), ("w_down", plain[1]), ("packed_features", 25),
        ("x", normal(5, 48).double()), ("w_gate_up", up.repeat(1, 2, 1)[:, ::2]),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=r"fused_experts: \w+: expected .+, got"):
            op(**call | {name: bad})
    with pytest.raises(RuntimeError, match=r"fused_experts: x: expected \[N, 48\]"):  # as wide in memory
        ops.fused_experts(normal(5, 41), *form, rest["weights"], rest["ids"])
    with pytest.raises(ValueError, match="pack_experts: group_size: expected a multiple of 8 that divides K = 48"):
        ops.pack_experts(layer["w_gate_up"], "int4", gated=True, group_size=32)
    with pytest.raises(ValueError, match="pack_experts: group_size: expected none beside bf16"):
        ops.pack_experts(layer["w_gate_up"], "bf16", group_size=16)
    with pytest.raises(ValueError, match="pack_experts: symmetric: expected True beside fp8_e4m3"):
        ops.pack_experts(layer["w_gate_up"], "fp8_e4m3", symmetric=False)
