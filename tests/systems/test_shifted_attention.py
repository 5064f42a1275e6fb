"""Attention in shifted groups is dense attention under its mask, in value and gradient; the wrapped form is the rolled
one; the other is causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effops import reference
from effops.systems.shifted_attention import shifted_group_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies.values import normal
from torch import Tensor


def visible(
    count: int, heads: int, group_size: int, *, shift_heads: int = 0, num_sinks: int = 0, wraparound: bool = False
) -> Tensor:
    """bool [H,T,T], from the definition."""
    i, j = torch.arange(count)[:, None], torch.arange(count)
    seen = []
    for head in range(heads):
        half = group_size // 2 if head >= heads - shift_heads else 0
        if half and wraparound:
            ri, rj = (i - half) % count, (j - half) % count
            own = (ri // group_size == rj // group_size) & (rj <= ri)
        else:
            ahead = group_size - half if half else 0
            own = ((i + ahead) // group_size == (j + ahead) // group_size) & (j <= i)
        seen.append(own | ((j < num_sinks) & (j <= i)))
    return torch.stack(seen)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    ratio = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(ratio, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(batch: int, count: int, heads: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    return [
        normal(batch, count, h, d, dtype=torch.float64, seed=3 * seed + i).requires_grad_()
        for i, (h, d) in enumerate(sizes)
    ]


@st.composite
def cases(draw: Any) -> tuple[int, int, int, int, int, dict[str, Any]]:
    kv_heads, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, group_size = kv_heads * ratio, draw(st.integers(1, 12))
    wraparound = draw(st.booleans())
    count = group_size * draw(st.integers(1, 5)) if wraparound else draw(st.integers(1, 50))
    shift_heads = draw(st.integers(0, heads))
    most = group_size // 2 if wraparound and shift_heads else count + 2
    options = {"shift_heads": shift_heads, "num_sinks": draw(st.integers(0, most)), "wraparound": wraparound}
    return draw(st.integers(1, 2)), count, heads, kv_heads, group_size, options


@settings(max_examples=150)
@given(cases())
def test_it_is_dense_attention_under_its_mask(case):
    """Gradients too: a key that is counted twice, or not at all, shows in them."""
    batch, count, heads, kv_heads, group_size, options = case
    qkv, seed = inputs(batch, count, heads, kv_heads), normal(batch, count, heads, 5, dtype=torch.float64, seed=9)
    got = shifted_group_attention(*qkv, group_size, **options)
    expected = dense(*qkv, visible(count, heads, group_size, **options))
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(got, qkv, seed), torch.autograd.grad(expected, qkv, seed), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
def test_wrapped_groups_are_longloras_rolls(groups, half, kv_heads):
    """Half of the heads are rolled back by half a group, cut, attended to and rolled forth."""
    size, heads = 2 * half, 2 * kv_heads
    q, k, v = inputs(2, groups * size, heads, kv_heads)
    rolled = [x.repeat_interleave(2, 2) if x.shape[2] != heads else x for x in (q, k, v)]
    rolled = [torch.cat([x[:, :, :kv_heads], x[:, :, kv_heads:].roll(-half, 1)], 2) for x in rolled]
    cut = [x.reshape(2 * groups, size, heads, -1) for x in rolled]
    out = dense(*cut, torch.ones(size, size, dtype=torch.bool).tril()).reshape(2, groups * size, heads, -1)
    expected = torch.cat([out[:, :, :kv_heads], out[:, :, kv_heads:].roll(half, 1)], 2)
    got = shifted_group_attention(q, k, v, size, shift_heads=kv_heads, wraparound=True)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


@given(cases(), st.data())
def test_nothing_depends_on_later_tokens(case, data):
    batch, count, heads, kv_heads, group_size, options = case
    options["wraparound"] = False
    at = data.draw(st.integers(0, count - 1))
    first, second = inputs(batch, count, heads, kv_heads), inputs(batch, count, heads, kv_heads, seed=1)
    changed = [torch.cat([a[:, :at], b[:, at:]], 1) for a, b in zip(first, second, strict=True)]
    a, b = (shifted_group_attention(*x, group_size, **options) for x in (first, changed))
    assert torch.equal(a[:, :at], b[:, :at])
    assert not torch.equal(a[:, at:], b[:, at:])


def test_with_wraparound_the_first_tokens_see_the_last():
    q, k, v = inputs(1, 16, 2, 2)
    changed = torch.cat([v[:, :-1], v[:, -1:] + 1], 1)
    a, b = (shifted_group_attention(q, k, x, 8, shift_heads=1, wraparound=True) for x in (v, changed))
    assert not torch.allclose(a[:, 0, 1], b[:, 0, 1]) and torch.equal(a[:, 0, 0], b[:, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_is_causal_attention(dtype):
    q, k, v = (x.detach().to(dtype) for x in inputs(2, 40, 4, 2))
    got = shifted_group_attention(q, k, v, 40, num_sinks=3)
    expected = reference.attention(q.double(), k.double(), v.double(), causal=True)
    assert torch.allclose(got.double(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_no_tokens():
    q, k, v = (torch.empty(2, 0, h, 8) for h in (4, 2, 2))
    assert shifted_group_attention(q, k, v, 8, shift_heads=2, num_sinks=2).shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"group_size": 0}, "group_size: expected 1 or more, got 0"),
        ({"shift_heads": 5}, r"shift_heads: expected a number in \[0, 4\], got 5"),
        ({"num_sinks": -1}, "num_sinks: expected 0 or more, got -1"),
        ({"group_size": 7, "wraparound": True}, "group_size: expected a divisor of T = 16 with wraparound, got 7"),
        ({"num_sinks": 5, "shift_heads": 2, "wraparound": True}, "num_sinks: expected at most half a group of 8 with"),
    ],
)
def test_wrong_sizes(options, says):
    q, k, v = inputs(1, 16, 4, 2)
    with pytest.raises(ValueError, match=f"shifted_group_attention: {says}"):
        shifted_group_attention(q, k, v, **{"group_size": 8} | options)
    with pytest.raises(ValueError, match="shifted_group_attention: q, k, v: expected"):
        shifted_group_attention(q, k[:, 1:], v, 8)
    with pytest.raises(ValueError, match="shifted_group_attention: q: expected a multiple of 2 heads, got 3"):
        shifted_group_attention(q[:, :, :3], k, v, 8)
