"""The reference against hand-written loops, torch's SDPA and the corner cases it defines."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from effops import reference
from torch.nn.functional import scaled_dot_product_attention

DOUBLE = torch.float64


def tensors(batch=2, q_len=3, capacity=7, heads=4, kv_heads=2, dim=8, v_dim=6, dtype=DOUBLE, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=gen, dtype=DOUBLE).to(dtype)

    return (
        rand(batch, q_len, heads, dim),
        rand(batch, capacity, kv_heads, dim),
        rand(batch, capacity, kv_heads, v_dim),
    )


def loop_attention(q, k, v, kv_lens, kv_starts, allowed, sinks, softcap, scale):
    """One query, one head, one key at a time, in Python floats."""
    batch, q_len, heads = q.shape[:3]
    group = heads // k.shape[2]
    out = torch.zeros(batch, q_len, heads, v.shape[3], dtype=DOUBLE)
    lse = torch.full((batch, q_len, heads), -math.inf, dtype=DOUBLE)
    for b, i, h in product(range(batch), range(q_len), range(heads)):
        g = h // group
        position = kv_lens[b] - q_len + i
        logits, rows = [], []
        for j in range(kv_starts[b], kv_lens[b]):
            if allowed(b, g, position - kv_starts[b], j - kv_starts[b]):
                s = scale * sum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, g], strict=True))
                logits.append(softcap * math.tanh(s / softcap) if softcap else s)
                rows.append(v[b, j, g])
        total = sum(math.exp(s) for s in logits) + (math.exp(sinks[h]) if sinks is not None else 0.0)
        if total:
            lse[b, i, h] = math.log(total)
        for s, row in zip(logits, rows, strict=True):
            out[b, i, h] += math.exp(s) / total * row
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window, head_windows", [(None, None), (2, None), (None, [0, 2])])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_loop(causal, window, head_windows, extras):
    q, k, v = tensors()
    kv_lens, kv_starts = [7, 4], [2, 0]
    prefix_lens, num_sinks, softcap = ([1, 2], 1, 3.0) if extras else ([0, 0], 0, 0.0)
    sinks = [0.3, -1.0, 2.0, 0.0] if extras else None
    widths = head_windows or [window or 0] * 2

    def allowed(b, g, position, j):
        seen = not causal or j <= position or j < prefix_lens[b]
        near = widths[g] == 0 or j > position - widths[g] or j < num_sinks
        return seen and near

    expected = loop_attention(q, k, v, kv_lens, kv_starts, allowed, sinks, softcap, 0.4)
    got = reference.attention(
        q,
        k,
        v,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        kv_starts=torch.tensor(kv_starts, dtype=torch.int32),
        causal=causal,
        window=window,
        head_windows=None if head_windows is None else torch.tensor(head_windows, dtype=torch.int32),
        num_sinks=num_sinks,
        prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32),
        sink_logits=None if sinks is None else torch.tensor(sinks),
        softcap=softcap,
        scale=0.4,
        return_lse=True,
    )
    torch.testing.assert_close(got, expected, rtol=1e-6 if extras else 1e-12, atol=1e-6 if extras else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_equals_sdpa(dtype):
    q, k, v = tensors(q_len=5, capacity=5, v_dim=8, dtype=dtype)
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    got = reference.attention(q, k, v, causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_more_queries_than_keys():
    q, k, v = tensors(q_len=5, capacity=3)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -math.inf).all()
    assert torch.isfinite(lse[:, 2:]).all()
    everything, _ = reference.attention(q, k, v, return_lse=True)
    assert (everything[:, :2] != 0).any()


def test_empty_rows_and_poison_leave_gradients_clean():
    q, k, v = tensors()
    k[0, 5:], v[0, 5:] = math.nan, math.inf
    k[1, :2], v[1, :2] = math.nan, math.nan
    lens = torch.tensor([5, 2], dtype=torch.int32)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    for x in (q, k, v):
        x.requires_grad_()
    sinks = torch.zeros(4, dtype=DOUBLE, requires_grad=True)
    for options in ({}, {"sink_logits": sinks}):
        out, lse = reference.attention(q, k, v, kv_lens=lens, kv_starts=starts, causal=True, return_lse=True, **options)
        assert (out[1] == 0).all() and torch.isfinite(out).all()
        assert (lse[1] == (0.0 if options else -math.inf)).all()
        finite = torch.where(torch.isfinite(lse), lse, 0.0)
        grads = torch.autograd.grad(out.square().sum() + finite.sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert (grads[0][1] == 0).all() and (grads[1][0, 5:] == 0).all() and (grads[2][1] == 0).all()


def test_no_queries_no_keys_no_batch():
    for sizes in ({"q_len": 0}, {"capacity": 0}, {"batch": 0}):
        q, k, v = tensors(**sizes)
        out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
        assert out.shape == (*q.shape[:3], 6) and (out == 0).all() and (lse == -math.inf).all()


def test_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(q_len=4, capacity=3, heads=2, kv_heads=1, dim=3, v_dim=2))
    sinks = torch.tensor([0.5, -0.5], dtype=DOUBLE, requires_grad=True)

    def run(q, k, v, sinks):
        out, lse = reference.attention(q, k, v, causal=True, softcap=2.0, window=2, sink_logits=sinks, return_lse=True)
        return out, lse

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))


def test_sink_gradient_is_the_stated_formula():
    q, k, v = tensors()
    sinks = torch.tensor([0.5, -0.5, 0.1, 2.0], dtype=DOUBLE, requires_grad=True)
    out, lse = reference.attention(q, k, v, sink_logits=sinks, return_lse=True)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    (got,) = torch.autograd.grad((out, lse), sinks, (d_out, d_lse))
    expected = -(torch.exp(sinks - lse) * ((d_out * out).sum(-1) - d_lse)).sum((0, 1))
    torch.testing.assert_close(got, expected)


def test_varlen_equals_each_sequence_alone():
    q, k, v = tensors(batch=1, q_len=6, capacity=9)
    cu_q = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 7, 9], dtype=torch.int32)
    out, lse = reference.varlen_attention(q[0], k[0], v[0], cu_q, cu_k, causal=True, window=3, return_lse=True)
    for rows, keys in ((slice(0, 2), slice(0, 5)), (slice(2, 6), slice(7, 9))):
        one = reference.attention(q[:, rows], k[:, keys], v[:, keys], causal=True, window=3, return_lse=True)
        assert torch.equal(out[rows], one[0][0]) and torch.equal(lse[rows], one[1][0])


def test_merge_of_split_keys_is_the_whole():
    q, k, v = tensors(capacity=10)
    whole = reference.attention(q, k, v, return_lse=True)
    cuts = [slice(0, 3), slice(3, 3), slice(3, 10)]
    parts = [reference.attention(q, k[:, c], v[:, c], return_lse=True) for c in cuts]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    outs[1] = math.nan  # a part without keys is neutral whatever it holds
    torch.testing.assert_close(reference.merge_states(outs, lses), whole)
    nothing = reference.merge_states(torch.zeros(2, 3, 4), torch.full((2, 3), -math.inf))
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()


def test_append_kv_writes_the_slots_and_skips_minus_one():
    _, k_cache, v_cache = tensors()
    _, k, v = tensors(capacity=2, seed=1)
    before = k_cache.clone(), v_cache.clone()
    reference.append_kv(k_cache, v_cache, k, v, torch.tensor([[6, -1], [0, 3]], dtype=torch.int32))
    for cache, new, old in ((k_cache, k, before[0]), (v_cache, v, before[1])):
        expected = old.clone()
        expected[0, 6], expected[1, 0], expected[1, 3] = new[0, 0], new[1, 0], new[1, 1]
        assert torch.equal(cache, expected)
