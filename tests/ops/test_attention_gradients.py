"""Gradients of ``attention``, ``varlen_attention`` and ``merge_states``: against finite differences, and against the
exact gradient within derived bounds."""

from __future__ import annotations

import pytest
import torch
from backend import NAME, cpu_only
from effops import ops
from effops.reference.gradient_bounds import attention_gradient_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import Case, dense, offsets
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.attention

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"kv_lens": int32(5, 2), "kv_starts": int32(1, 2), "causal": True},
    "window": {"causal": True, "window": 2, "num_sinks": 1},
    "head windows": {"causal": True, "head_windows": int32(0, 2)},
    "prefix": {"causal": True, "prefix_lens": int32(4, 0)},
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "scale": {"scale": -0.5},
}


def gradients(case: Case, seed: int, through_lse: bool = True) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Gradients of q, k, v (and sink_logits), and what came in through out and lse."""
    tracked = [x.detach().clone().requires_grad_() for x in case.tensors]
    sinks = {n: x.clone().requires_grad_() for n, x in case.options.items() if n == "sink_logits"}
    tracked += sinks.values()
    out, lse = ops.attention(*tracked[:3], return_lse=True, **{**case.options, **sinks})
    d_out, d_lse = normal(*out.shape, dtype=out.dtype, seed=seed), normal(*lse.shape, dtype=lse.dtype, seed=seed + 1)
    if not through_lse:
        return list(torch.autograd.grad(out, tracked, d_out)), d_out, None
    return list(torch.autograd.grad((out, lse), tracked, (d_out, d_lse))), d_out, d_lse


def worst(case: Case, seed: int = 7, through_lse: bool = True) -> float:
    got, d_out, d_lse = gradients(case, seed, through_lse)
    exact = attention_gradient_bound(d_out, d_lse, *case.tensors, rounded_weights=NAME != "cpu", **case.options)
    return max(exact[name].worst(x) for name, x in zip(("q", "k", "v", "sink_logits"), got, strict=False))


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(dense(DTYPES[dtype], kinds=("normal", "spikes", "zeros")))
    assert worst(case, through_lse=data.draw(st.booleans())) <= 1


@pytest.mark.core
@pytest.mark.parametrize("shape", [(1, 129, 4, 1, 64, 64), (65, 65, 4, 2, 40, 24), (30, 200, 6, 2, 33, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_and_row_blocks(dtype, shape):
    """64 keys a tile, 64 rows a block; each option of OPTIONS at this size, sinks included."""
    tokens, capacity, heads, kv_heads, dim, v_dim = shape
    q = values(2, tokens, heads, dim, dtype=DTYPES[dtype], seed=1)
    k, v = (values(2, capacity, kv_heads, d, dtype=q.dtype, seed=d, kind="spikes") for d in (dim, v_dim))
    masks = {"causal": True, "window": 50, "num_sinks": 3, "kv_starts": int32(0, 5), "kv_lens": int32(capacity, 60)}
    scores = {"softcap": 3.0, "scale": 0.3, "sink_logits": normal(heads, seed=9)}
    for options in (masks, scores, {**masks, **scores}, {"head_windows": int32(*range(7, 7 + kv_heads))}):
        assert worst(Case((q, k, v), options)) <= 1


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_threads_and_batch_do_not_matter(dtype):
    q, k, v = (normal(2, n, h, 40, dtype=DTYPES[dtype], seed=n) for n, h in ((20, 4), (150, 2), (150, 2)))
    options = {"causal": True, "sink_logits": normal(4), "kv_lens": int32(150, 70)}
    plain, d_out, d_lse = gradients(Case((q, k, v), options), 7)
    for place in LAYOUTS.values():
        placed = [place(x).requires_grad_() for x in (q, k, v)]
        out, lse = ops.attention(*placed, return_lse=True, **options)
        got = torch.autograd.grad((out, lse), placed, (place(d_out), place(d_lse)))
        assert all(same_bits(a, b) for a, b in zip(got, plain, strict=False))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(same_bits(a, b) for a, b in zip(gradients(Case((q, k, v), options), 7)[0], plain, strict=True))


@pytest.mark.core
def test_keys_that_do_not_exist_have_gradient_zero():
    """NaN in them reaches no gradient; rows and sequences without keys pass none."""
    k, v = normal(2, 70, 1, 8, seed=1), normal(2, 70, 1, 8, seed=2)
    k[0, 40:], v[0, 40:], k[1], v[1] = torch.nan, torch.nan, torch.nan, torch.nan
    case = Case((normal(2, 50, 2, 8), k, v), {"kv_lens": int32(40, 0), "causal": True})
    dq, dk, dv = gradients(case, 3)[0]
    assert dk[0, 40:].eq(0).all() and dk[1].eq(0).all() and dv[0, 40:].eq(0).all() and dv[1].eq(0).all()
    assert dq[0, :10].eq(0).all() and dq[1].eq(0).all() and dq.isfinite().all()
    assert dk[0, :40].isfinite().all() and dk[0, 0].ne(0).all() and dv[0, 0].ne(0).all()


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_gradients_are_those_of_each_sequence(dtype):
    q_lens, k_lens = [1, 0, 20, 3], [130, 5, 40, 0]
    q, cu_q, cu_k = normal(27, 4, 24, dtype=DTYPES[dtype]), offsets(q_lens), offsets(k_lens)
    k, v = (normal(180, 2, d, dtype=q.dtype, seed=d) for d in (24, 16))  # more rows than offsets own
    options = {"causal": True, "window": 30, "sink_logits": normal(4, seed=4)}
    tracked = [x.clone().requires_grad_() for x in (q, k, v, options["sink_logits"])]
    out, lse = ops.varlen_attention(*tracked[:3], cu_q, cu_k, return_lse=True, **{**options, "sink_logits": tracked[3]})
    d_out, d_lse = normal(*out.shape, dtype=out.dtype, seed=5), normal(*lse.shape, dtype=lse.dtype, seed=6)
    dq, dk, dv, ds = torch.autograd.grad((out, lse), tracked, (d_out, d_lse))
    total = torch.zeros(4, dtype=torch.float64)
    for b in range(4):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x.clone().requires_grad_() for x in (q[None, rows], k[None, keys], v[None, keys], tracked[3].detach())]
        one = ops.attention(*alone[:3], return_lse=True, **{**options, "sink_logits": alone[3]})
        expected = torch.autograd.grad(one, alone, (d_out[None, rows], d_lse[None, rows]))
        for got, right in zip((dq[rows], dk[keys], dv[keys]), expected, strict=False):
            assert same_bits(got.contiguous(), right[0])
        total += expected[3].double()
    torch.testing.assert_close(ds.double(), total, rtol=1e-5, atol=1e-6)
    assert all(x.eq(0).all() for x in (dq[24:], dk[175:], dv[175:]))


@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_gradients(dtype):
    outs, lses = normal(3, 5, 8, dtype=DTYPES[dtype]), 2 * normal(3, 5, dtype=torch.float64, seed=1)
    lses[1, 2], lses[:, 4] = -torch.inf, -torch.inf
    lses = lses.to(torch.float64 if dtype == "f64" else torch.float32)
    tracked = outs.clone().requires_grad_(), lses.clone().requires_grad_()
    out, lse = ops.merge_states(*tracked)
    d_out, d_lse = normal(5, 8, dtype=out.dtype, seed=2), normal(5, dtype=lse.dtype, seed=3)
    d_outs, d_lses = torch.autograd.grad((out, lse), tracked, (d_out, d_lse))
    weights = torch.where(lses.isneginf(), 0.0, lses.double().exp())
    weights = weights / weights.sum(0).clamp(min=1e-30)
    mean = (weights[..., None] * outs.double()).sum(0)
    expected = weights * (((outs.double() - mean) * d_out.double()).sum(-1) + d_lse.double())
    tolerance = {"bf16": 3e-2, "f16": 4e-3, "f32": 1e-5, "f64": 1e-12}[dtype]
    torch.testing.assert_close(d_outs.double(), weights[..., None] * d_out.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(d_lses.double(), expected, rtol=tolerance, atol=tolerance)


@cpu_only("attention has no float64 kernel there")
@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("options", OPTIONS)
def test_finite_differences(options, sinks, through):
    named = dict(OPTIONS[options])
    q, k, v = (normal(2, n, h, d, dtype=torch.float64, seed=n + d) for n, h, d in ((4, 4, 3), (5, 2, 3), (5, 2, 2)))
    inputs = [q, k, v] + [normal(4, seed=1)] * sinks

    def call(*x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = ops.attention(*x[:3], return_lse=True, **named, **({"sink_logits": x[3]} if sinks else {}))
        lse = torch.where(lse.isfinite(), lse, 0.0)  # -inf has no differences
        return {"out": out, "lse": lse, "both": (out, lse)}[through]

    smooth = [x.requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *x: call(*x, *inputs[3:]), smooth)


@cpu_only("attention has no float64 kernel there")
@pytest.mark.parametrize("options", ["plain", "window", "prefix", "softcap"])
def test_finite_differences_of_ragged_attention(options):
    q, k, v = (normal(n, h, d, dtype=torch.float64, seed=n + d).requires_grad_()
               for n, h, d in ((6, 2, 3), (8, 1, 3), (8, 1, 2)))  # fmt: skip

    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.varlen_attention(*x, int32(0, 2, 5), int32(0, 5, 7), return_lse=True, **OPTIONS[options])
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_finite_differences_of_merging():
    outs, lses = normal(3, 2, 4, dtype=torch.float64), normal(3, 2, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(ops.merge_states, (outs.requires_grad_(), lses.requires_grad_()))


def test_second_derivatives_are_refused():
    """Rather than left out: the first gradient would seem constant in q."""
    q = normal(1, 2, 1, 4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentia|derivative"):
        (first,) = torch.autograd.grad(ops.attention(q, q, q).sum(), q, create_graph=True)
        (first.square().sum() + q.sum()).backward()
