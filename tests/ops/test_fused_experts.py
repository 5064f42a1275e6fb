"""``fused_experts``: within bounds in every form, the same as its parts, laws of choices and weights."""

from __future__ import annotations

from typing import Any

import effops
import pytest
import torch
from backend import NAME, cpu_only, sized
from effops import ops, reference
from effops.reference.moe_bounds import fused_experts_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies import experts
from strategies.experts import PLACES, layer_of, weights_of
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core

ON_BACKEND = {name: dtype for name, dtype in DTYPES.items() if NAME == "cpu" or name != "f64"}
DTYPE = pytest.mark.parametrize("dtype", ON_BACKEND)  # float64 products are the CPU's
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
WIDTHS = st.sampled_from(
    (1, 2, 7, 8, 16, 17, 31, 32, 33, 64, 65) if NAME == "simt" else (1, 2, 7, 16, 17, 33, 64, 65, 100)
)


def ids_of(tokens: int, k: int, count: int, seed: int = 0) -> Tensor:
    return torch.rand(tokens, count, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :k].int()


def int8_of(layer: dict[str, Any]) -> dict[str, Any]:
    """The same layer with int8 weights and their scales."""
    packed = {name: ops.pack_experts(layer[name]) for name in ("w_gate_up", "w_down")}
    scales = {"scale_gate_up": packed["w_gate_up"].scale, "scale_down": packed["w_down"].scale}
    return layer | {name: p.data for name, p in packed.items()} | scales


@DTYPE
@given(data=st.data())
def test_any_call(dtype, data):
    count, tokens, k = (
        data.draw(st.integers(1, 6)),
        data.draw(st.sampled_from((0, 1, 2, 3, 9, 30))),
        data.draw(st.integers(0, 3)),
    )
    dim, inner = data.draw(WIDTHS), data.draw(WIDTHS)
    gated, biased, int8 = (data.draw(st.booleans()) for _ in range(3))
    activation = data.draw(st.sampled_from(ACTIVATIONS if gated else ACTIVATIONS[:-1]))
    options: dict[str, Any] = {"activation": activation}
    options["interleaved"] = gated and data.draw(st.booleans())
    layer = layer_of(count, dim, inner, DTYPES[dtype], gated, biased, data.draw(st.integers(0, 99)))
    layer = int8_of(layer) if int8 else layer
    x, ids = normal(tokens, dim, dtype=DTYPES[dtype]), data.draw(experts.choices(tokens, k, count))
    weights = weights_of(tokens, k, x.dtype)

    def placed(name: str, t: Tensor) -> Tensor:
        if t.dtype == torch.int8:
            return t.mT.contiguous().mT if data.draw(st.booleans()) else t
        if name.startswith("w_") and data.draw(st.booleans()):
            return data.draw(PLACES)(t.mT).mT
        return data.draw(PLACES)(t)

    there = {name: placed(name, t) for name, t in layer.items()}
    got = ops.fused_experts(
        data.draw(PLACES)(x), weights=data.draw(PLACES)(weights), ids=data.draw(PLACES)(ids), **there, **options
    )
    assert got.dtype == x.dtype and got.is_contiguous()
    assert fused_experts_bound(x, weights=weights, ids=ids, **layer, **options).worst(got) <= 1


@DTYPE
@EACH_ACTIVATION
@pytest.mark.parametrize("biased", [False, True])
def test_every_form(dtype, activation, biased):
    """Halves and interleaved, without a gate, weights transposed in memory, int8."""
    x, ids, weights = normal(11, 48, dtype=DTYPES[dtype]), ids_of(11, 3, 5), weights_of(11, 3, DTYPES[dtype])
    for gated in (True, False):
        layer = layer_of(5, 48, 36, x.dtype, gated, biased)
        if activation == "swiglu_oai" and not gated:
            for module, error in ((ops, RuntimeError), (reference, ValueError)):
                with pytest.raises(error, match="activation: expected another than swiglu_oai without a gate"):
                    module.fused_experts(x, weights=weights, ids=ids, **layer, activation=activation)
            continue
        for form in (layer, int8_of(layer)):
            for interleaved in (False, True)[: 1 + gated]:
                options = {"activation": activation, "interleaved": interleaved}
                exact = fused_experts_bound(x, weights=weights, ids=ids, **form, **options)
                assert exact.worst(ops.fused_experts(x, weights=weights, ids=ids, **form, **options)) <= 1
                turned = form | {n: form[n].mT.contiguous().mT for n in ("w_gate_up", "w_down")}
                assert exact.worst(ops.fused_experts(x, weights=weights, ids=ids, **turned, **options)) <= 1


@DTYPE
@EACH_ACTIVATION
def test_activations_over_their_range(dtype, activation):
    """The gate alone, from far below zero to far above: W is the identity, so that every value is seen."""
    gates = torch.cat([torch.linspace(-30, 30, 61), torch.linspace(-3, 3, 67)]).to(DTYPES[dtype])
    x = torch.stack([gates, torch.linspace(-9, 9, 128).to(gates.dtype)], 1)
    eye = torch.eye(2, dtype=x.dtype)[None]
    call = {"w_gate_up": eye, "w_down": eye[:, :, :1].contiguous(), "activation": activation}
    ids, weights = torch.zeros(128, 1, dtype=torch.int32), torch.ones(128, 1, dtype=weights_of(1, 1, x.dtype).dtype)
    exact = fused_experts_bound(x, weights=weights, ids=ids, **call)
    got = ops.fused_experts(x, weights=weights, ids=ids, **call)
    assert exact.worst(got) <= 1
    if dtype in ("f32", "f64"):
        expected = reference.fused_experts(
            x.double(),
            weights=weights.double(),
            ids=ids,
            **{n: t.double() if isinstance(t, Tensor) else t for n, t in call.items()},
        )
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=1e-12)


@DTYPE
def test_the_parts_give_the_same(dtype):
    """permute, two products, torch's activation, unpermute: what a call with gradients does, and its bound."""
    layer = layer_of(6, 40, 24, DTYPES[dtype], biased=True)
    x, ids, weights = normal(20, 40, dtype=DTYPES[dtype]), ids_of(20, 2, 6), weights_of(20, 2, DTYPES[dtype])
    tracked = ops.fused_experts(x.clone().requires_grad_(), weights=weights, ids=ids, **layer)
    assert tracked.requires_grad
    assert fused_experts_bound(x, weights=weights, ids=ids, **layer).worst(tracked.detach()) <= 1


@DTYPE
def test_choices(dtype):
    """-1 adds nothing, whatever its weight; an expert that comes twice adds its weights; no choice gives zeros."""
    layer = layer_of(4, 32, 20, DTYPES[dtype])
    x, weights = normal(7, 32, dtype=DTYPES[dtype]), weights_of(7, 3, DTYPES[dtype]).fill_(0.5)
    ids = ids_of(7, 3, 4)
    ids[:, 2] = -1
    plain = ops.fused_experts(x, weights=weights, ids=ids, **layer)
    flawed = torch.where(ids < 0, torch.nan, weights)
    assert same_bits(ops.fused_experts(x, weights=flawed, ids=ids, **layer), plain)
    assert same_bits(ops.fused_experts(x, weights=weights[:, :2], ids=ids[:, :2], **layer), plain)
    nothing = ops.fused_experts(x, weights=flawed.fill_(torch.nan), ids=torch.full_like(ids, -1), **layer)
    assert (nothing == 0).all()
    twice = ops.fused_experts(x, weights=weights[:, :2], ids=ids[:, :1].expand(-1, 2), **layer)
    once = ops.fused_experts(x, weights=2 * weights[:, :1], ids=ids[:, :1], **layer)
    bound = fused_experts_bound(x, weights=2 * weights[:, :1], ids=ids[:, :1], **layer)
    assert bound.worst(twice) <= 1 and bound.worst(once) <= 1


@DTYPE
def test_permuted_experts_and_tokens(dtype):
    """Experts under other names, tokens in another order: the same rows within the bound, tokens with the same bits."""
    layer = layer_of(5, 33, 18, DTYPES[dtype], biased=True)
    x, ids, weights = normal(12, 33, dtype=DTYPES[dtype]), ids_of(12, 2, 5), weights_of(12, 2, DTYPES[dtype])
    plain = ops.fused_experts(x, weights=weights, ids=ids, **layer)
    names = torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.empty_like(names).index_copy_(0, names, torch.arange(5)).int()[ids.long()]
    moved = ops.fused_experts(x, weights=weights, ids=renamed, **{n: t[names] for n, t in layer.items()})
    assert fused_experts_bound(x, weights=weights, ids=ids, **layer).worst(moved) <= 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert same_bits(ops.fused_experts(x[order], weights=weights[order], ids=ids[order], **layer), plain[order])


@DTYPE
def test_all_experts_are_the_dense_mixture(dtype):
    """k = E with the softmax as weights is the mixture of all experts."""
    layer = layer_of(4, 24, 16, DTYPES[dtype])
    x, logits = normal(9, 24, dtype=DTYPES[dtype]), normal(9, 4, seed=5)
    weights, ids = ops.topk_routing(logits.to(weights_of(1, 1, x.dtype).dtype), 4)
    got = ops.fused_experts(x, weights=weights, ids=ids, **layer)
    wide = {n: t.double() for n, t in layer.items()}
    h = torch.einsum("td,efd->tef", x.double(), wide["w_gate_up"])
    y = torch.einsum("tef,edf->ted", torch.nn.functional.silu(h[..., :16]) * h[..., 16:], wide["w_down"])
    mixture = (logits.double().softmax(-1)[..., None] * y).sum(1)
    torch.testing.assert_close(got.double(), mixture, rtol=0, atol={"f32": 1e-6, "f64": 1e-14}.get(dtype, 0.06))


@DTYPE
def test_no_token_sees_the_others(dtype):
    """Under batch_invariant a token alone has the bits it has in a batch; NaN stays in its token."""
    layer = layer_of(3, 40, 24, DTYPES[dtype])
    x, ids, weights = normal(70, 40, dtype=DTYPES[dtype]), ids_of(70, 2, 3), weights_of(70, 2, DTYPES[dtype])
    with effops.batch_invariant():
        plain = ops.fused_experts(x, weights=weights, ids=ids, **layer)
        for t in (0, 33, 69):
            alone = ops.fused_experts(x[t : t + 1], weights=weights[t : t + 1], ids=ids[t : t + 1], **layer)
            assert same_bits(alone, plain[t : t + 1])
    flawed, plain = x.clone(), ops.fused_experts(x, weights=weights, ids=ids, **layer)
    flawed[33, 39] = torch.nan
    got = ops.fused_experts(flawed, weights=weights, ids=ids, **layer)
    assert got[33].isnan().all()
    got[33] = plain[33]
    assert same_bits(got, plain)


@DTYPE
def test_an_expert_nobody_chose_is_not_read(dtype):
    layer = layer_of(4, 24, 16, DTYPES[dtype], biased=True)
    x, ids, weights = normal(6, 24, dtype=DTYPES[dtype]), ids_of(6, 2, 3), weights_of(6, 2, DTYPES[dtype])
    plain = ops.fused_experts(x, weights=weights, ids=ids, **layer)
    for t in layer.values():
        t[3] = torch.nan
    assert same_bits(ops.fused_experts(x, weights=weights, ids=ids, **layer), plain)


@DTYPE
def test_layout_and_threads_do_not_matter(dtype):
    tokens, dim, inner = sized(60, 6), sized(150, 40), sized(90, 24)
    layer = layer_of(4, dim, inner, DTYPES[dtype], biased=True)
    x, ids, weights = (
        normal(tokens, dim, dtype=DTYPES[dtype]),
        ids_of(tokens, 2, 4),
        weights_of(tokens, 2, DTYPES[dtype]),
    )
    plain = ops.fused_experts(x, weights=weights, ids=ids, **layer)
    for place in LAYOUTS.values():
        biases = {n: place(layer[n]) for n in ("bias_gate_up", "bias_down")}
        got = ops.fused_experts(place(x), weights=place(weights), ids=place(ids), **layer | biases)
        assert same_bits(got, plain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.fused_experts(x, weights=weights, ids=ids, **layer), plain)


def test_packed_experts():
    w = normal(3, 10, 17)
    w[1, 4] = 0
    packed = ops.pack_experts(w)
    assert packed.format == "int8" and packed.data.dtype == torch.int8 and packed.shape == (3, 10, 17)
    step = w.abs().amax(-1) / 127
    torch.testing.assert_close(packed.scale, step, rtol=0, atol=0)
    assert ((packed.dequantize() - w).abs() <= step[..., None] * 0.5001).all() and (
        packed.dequantize()[1, 4] == 0
    ).all()
    assert packed.data.abs().amax(-1)[step > 0].eq(127).all()
    halves = ops.pack_experts(torch.tensor([[[127.0, 0.5, 1.5, -2.5]]]))
    assert halves.data.tolist() == [[[127, 0, 2, -2]]], "half to even"
    for format, dtype in {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.items():
        assert same_bits(ops.pack_experts(w, format).dequantize(), w.to(dtype))
    assert ops.pack_experts(w, "f32").data.data_ptr() == w.data_ptr(), "a weight in the format is held, not copied"
    wrong_weights = {
        r"w: expected shape \[E, f, d\], got \[10, 17\]": w[0],
        "w: expected a floating dtype": w.int(),
        "w: expected finite values for int8, got NaN or inf": 0 / torch.zeros(1, 1, 1),
    }
    for says, wrong in wrong_weights.items():
        with pytest.raises(ValueError, match=f"pack_experts: {says}"):
            ops.pack_experts(wrong)
    with pytest.raises(ValueError, match=r"pack_experts: format: expected one of int8, int4, .+, got int3"):
        ops.pack_experts(w, "int3")
    with pytest.raises(ValueError, match="pack_experts: gated: expected False but for panels of an even f"):
        ops.pack_experts(w, gated=True)


@pytest.mark.parametrize("format", ["int8", "f32", "bf16", "f16"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_packed_weights_are_those_they_hold(dtype, format):
    if format not in ("int8", dtype):
        with pytest.raises(RuntimeError, match="fused_experts: w_gate_up: expected dtype"):
            call_packed(DTYPES[dtype], format)
        return
    x, call, plain, packed = call_packed(DTYPES[dtype], format)
    assert same_bits(packed, plain)
    assert fused_experts_bound(x, **call).worst(packed) <= 1


def call_packed(dtype: torch.dtype, format: str, **panels: bool) -> tuple[Tensor, dict[str, Any], Tensor, Tensor]:
    """x, a call with plain tensors, its result, and the result with packed weights."""
    layer = layer_of(4, 50, 37, dtype)
    x, ids, weights = normal(5, 50, dtype=dtype), ids_of(5, 2, 4), weights_of(5, 2, dtype)
    gate_up = ops.pack_experts(layer["w_gate_up"], format, gated=bool(panels), **panels)
    down = ops.pack_experts(layer["w_down"], format, **panels)
    got = ops.fused_experts(x, gate_up, down, weights, ids)
    call: dict[str, Any] = {"weights": weights, "ids": ids, **(int8_of(layer) if format == "int8" else layer)}
    return x, call, ops.fused_experts(x, **call), got


@cpu_only("panels are the CPU's")
@pytest.mark.parametrize("format", ["int8", "own"])
@DTYPE
def test_panels(dtype, format):
    """The same weights in the kernels' own order, and back."""
    own = "f32" if dtype == "f64" else dtype
    if dtype == "f64":
        return
    name = own if format == "own" else format
    x, call, _, packed = call_packed(DTYPES[dtype], name, panels=True)
    assert fused_experts_bound(x, **call).worst(packed) <= 1
    for gated, rows in ((False, 1), (False, 33), (True, 2), (True, 34), (True, 96)):
        for inner in (1, 7, 16):
            w = normal(2, rows, inner, dtype=DTYPES[dtype])
            there = ops.pack_experts(w, name, panels=True, gated=gated)
            assert there.shape == (2, rows, inner)
            assert same_bits(there.dequantize(), ops.pack_experts(w, name).dequantize())


@cpu_only("panels are the CPU's")
@pytest.mark.parametrize("format", ["int8", "own"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_panels_of_long_rows(dtype, format):
    """Longer than the stretches in which a panel is gone through, with every number of rows of a tile."""
    layer = layer_of(2, 1301, 661, DTYPES[dtype])
    name = dtype if format == "own" else format
    gate_up = ops.pack_experts(layer["w_gate_up"], name, gated=True, panels=True)
    down = ops.pack_experts(layer["w_down"], name, panels=True)
    for rows in range(1, 8):
        x, weights = normal(rows + 8, 1301, dtype=DTYPES[dtype]), weights_of(rows + 8, 1, DTYPES[dtype])
        ids = torch.tensor([0] * rows + [1] * 8, dtype=torch.int32)[:, None]
        call = {"weights": weights, "ids": ids, **(int8_of(layer) if format == "int8" else layer)}
        assert fused_experts_bound(x, **call).worst(ops.fused_experts(x, gate_up, down, weights, ids)) <= 1, rows
