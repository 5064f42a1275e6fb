"""The bounds hold for arithmetic in the dtype, and are tight enough to see small mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from effops import reference
from effops.reference import bounds
from effops.reference.bounds import Interval
from effops.reference.gradient_bounds import attention_gradient_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_interval():
    interval = Interval(torch.tensor([1.0, -math.inf, 0.0]).double(), torch.tensor([0.5, 0.0, 0.0]).double())
    assert interval.worst(torch.tensor([1.25, -math.inf, 0.0])) == 0.5
    assert interval.worst(torch.tensor([2.0, -math.inf, 0.0])) == 2.0
    assert interval.worst(torch.tensor([1.0, -1e30, 0.0])) == math.inf
    assert interval.worst(torch.tensor([1.0, -math.inf, 1e-30])) == math.inf
    assert interval.worst(torch.tensor([math.nan, -math.inf, 0.0])) == math.inf
    assert interval.worst(torch.tensor([1.0, -math.inf])) == math.inf
    assert Interval(torch.empty(0).double(), torch.empty(0).double()).worst(torch.empty(0)) == 0.0


def attention_inputs(dtype, capacity=200):
    q, k = draw(2, 5, 4, 64, dtype=dtype), draw(2, capacity, 2, 64, dtype=dtype, seed=1)
    return q, k, draw(2, capacity, 2, 48, dtype=dtype, seed=2)


OPTIONS = {
    "plain": {},
    "masked": {"causal": True, "window": 40, "num_sinks": 3, "kv_lens": torch.tensor([200, 3], dtype=torch.int32)},
    "padded": {"causal": True, "kv_starts": torch.tensor([0, 199], dtype=torch.int32)},
    "capped": {"softcap": 4.0, "scale": 0.2, "sink_logits": torch.tensor([0.0, -20.0, 5.0, 30.0])},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_in_its_own_dtype_is_inside(dtype, options):
    inputs, named = attention_inputs(dtype), OPTIONS[options]
    got = reference.attention(*inputs, return_lse=True, **named)
    assert all(b.worst(x) <= 1 for b, x in zip(bounds.attention_bound(*inputs, **named), got, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, options):
    inputs, named = attention_inputs(dtype), dict(OPTIONS[options])
    leaves = [x.requires_grad_() for x in inputs]
    if "sink_logits" in named:
        named["sink_logits"] = named["sink_logits"].clone().requires_grad_()
        leaves.append(named["sink_logits"])
    out, lse = reference.attention(*inputs, return_lse=True, **named)
    d_out, d_lse = draw(*out.shape, dtype=dtype, seed=5), draw(*lse.shape, dtype=lse.dtype, seed=6)
    got = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    exact = attention_gradient_bound(d_out, d_lse, *inputs, **named)
    without_lse = attention_gradient_bound(d_out, None, *inputs, **named)
    for name, right in zip(exact, got, strict=True):
        assert exact[name].worst(right) <= 1, name
        assert exact[name].worst(1.5 * right) > 1, name
        if name != "v":  # the gradient of v does not depend on lse
            assert without_lse[name].worst(right) > 1, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_key_is_outside(dtype):
    q, k, v = attention_inputs(dtype)
    out, lse = bounds.attention_bound(q, k, v)
    wrong = reference.attention(q, k[:, 1:], v[:, 1:], return_lse=True)
    assert lse.worst(wrong[1]) > 1
    assert out.worst(wrong[0]) > 1


def test_poison_outside_the_valid_keys_does_not_widen_the_bound():
    q, k, v = attention_inputs(torch.float32)
    lens = torch.tensor([100, 0], dtype=torch.int32)
    clean = bounds.attention_bound(q, k, v, kv_lens=lens)
    k[0, 100:], v[0, 100:], k[1], v[1] = math.nan, math.inf, math.nan, 1e30
    for a, b in zip(bounds.attention_bound(q, k, v, kv_lens=lens), clean, strict=True):
        assert torch.equal(a.error, b.error) and torch.equal(a.value, b.value)
        assert (a.error[1] == 0).all()


def test_rounded_scores_are_allowed_on_request_only():
    q, k, v = (8 * x for x in attention_inputs(torch.bfloat16))  # scores that rounding moves a lot
    k = k.repeat_interleave(2, 2)
    scores = torch.einsum("bthd,blhd->bhtl", q.float(), k.float()).bfloat16().float() / 8
    out = torch.einsum("bhtl,blhd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2).float()).bfloat16()
    assert bounds.attention_bound(q, k, v.repeat_interleave(2, 2))[0].worst(out) > 1
    assert bounds.attention_bound(q, k, v.repeat_interleave(2, 2), rounded_scores=True)[0].worst(out) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_equals_each_sequence_alone(dtype):
    q, k, v = draw(9, 4, 16, dtype=dtype), draw(40, 2, 16, dtype=dtype, seed=1), draw(40, 2, 8, dtype=dtype, seed=2)
    cu_q, cu_k = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0, 30, 39], dtype=torch.int32)
    out, lse = bounds.varlen_attention_bound(q, k, v, cu_q, cu_k, causal=True)
    alone = bounds.attention_bound(q[None, 3:8], k[None, 30:39], v[None, 30:39], causal=True)
    assert torch.equal(out.error[3:8], alone[0].error[0]) and torch.equal(lse.value[3:8], alone[1].value[0])
    assert out.value[8].eq(0).all() and out.error[8].eq(0).all() and lse.value[8].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_bounds(dtype):
    x, w = draw(3, 5, 64, dtype=dtype), draw(7, 64, dtype=dtype, seed=1)
    residual, norm = draw(3, 5, 7, dtype=dtype, seed=2), draw(64, dtype=dtype, seed=3)
    heads, table = x[:, :, None], draw(9, 16, dtype=torch.float32, seed=4)
    positions = torch.tensor([[0, 1, 8, 2, 2]] * 3, dtype=torch.int32)
    rotary = heads, table.cos(), table.sin(), positions
    outs, lses = (
        draw(3, 4, 8, dtype=dtype),
        draw(3, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    )
    pairs = [
        (bounds.packed_linear_bound(x, w, residual=residual), reference.packed_linear(x, w, residual=residual)),
        (bounds.packed_linear_bound(x, w, norm=norm), reference.packed_linear(x, w, norm=norm)),
        (bounds.packed_linear_bound(x, w[:, :32], gated=True), reference.packed_linear(x, w[:, :32], gated=True)),
        (bounds.rms_norm_bound(x, norm), reference.rms_norm(x, norm)),
        (bounds.rotary_bound(*rotary), reference.rotary(*rotary)),
        (bounds.silu_mul_bound(x), reference.silu_mul(x)),
        *zip(bounds.merge_states_bound(outs, lses), reference.merge_states(outs, lses), strict=True),
    ]
    for interval, right in pairs:
        assert interval.worst(right) <= 1
        assert interval.worst(right * 1.02 + 0.02) > 1
