"""Inputs on which attention must give one exact result, bit for bit: uniform scores, one-hot softmax, integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies.attention import TOKENS, lengths, mask_options
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def allowed(tokens: int, capacity: int, kv_heads: int, batch: int, **options: Any) -> Tensor:
    """[B,T,G,L] as the reference defines it."""
    window, head_windows = options.pop("window", None), options.pop("head_windows", None)
    windows = torch.tensor([window]) if window else head_windows
    for name, default in (("kv_lens", capacity), ("kv_starts", 0)):
        if options[name] is None:
            options[name] = torch.full((batch,), default)
    seen = reference.allowed_keys(tokens, capacity, windows=windows, **options)
    return seen.expand(-1, kv_heads, -1, -1).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=sized(100, 15))
@given(data=st.data())
def test_the_mask_itself(dtype, data):
    """All scores 0 and value j the j-th unit vector: the output is the mask divided by its count."""
    batch, kv_heads, group = (data.draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2), (1, 3, 4)))
    tokens, capacity = data.draw(st.sampled_from((*TOKENS, 50))), data.draw(st.integers(0, 250))
    options = data.draw(mask_options(batch, kv_heads, capacity))
    options |= {name: data.draw(lengths(batch, capacity)) for name in ("kv_lens", "kv_starts")}
    sink = data.draw(st.booleans())
    place = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    check_mask(dtype, batch, kv_heads, group, tokens, capacity, options, sink, place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", [2, 20])
def test_the_mask_at_the_edges_of_tiles(tokens, group, dtype):
    """The first row stands one key before the end of a tile, at it and behind it; a window leaves a few sinks apart."""
    none: dict[str, Any] = {"kv_lens": None, "kv_starts": None, "prefix_lens": None}
    for first in (15, 30, 31, 62, 63, 64, 126):
        for options in ({"causal": True}, {"causal": True, "window": 64}, {"window": 3, "num_sinks": 1}):
            check_mask(dtype, 1, 1, group, tokens, first + tokens, {"causal": False} | none | options)
    for capacity in (3, 5, 70):
        check_mask(dtype, 1, 1, group, tokens, capacity, {"causal": False, "window": 1, "num_sinks": 1} | none)


def check_mask(
    dtype: str, batch: int, kv_heads: int, group: int, tokens: int, capacity: int, options: dict[str, Any],
    sink: bool = False, place: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:  # fmt: skip
    seen = allowed(tokens, capacity, kv_heads, batch, **options).repeat_interleave(group, 2)
    count = seen.sum(-1, keepdim=True) + (1 if sink else 0)
    wide = torch.float64 if dtype == "f64" else torch.float32
    expected = torch.where(seen, 1 / count.clamp(min=1).to(wide), 0.0).to(DTYPES[dtype])

    q = torch.zeros(batch, tokens, kv_heads * group, 8, dtype=DTYPES[dtype])
    k = place(normal(batch, capacity, kv_heads, 8, dtype=q.dtype))
    v = place(torch.eye(capacity, dtype=q.dtype)[None, :, None].repeat(batch, 1, kv_heads, 1))
    if sink:
        options["sink_logits"] = torch.zeros(kv_heads * group)
    out, lse = ops.attention(q, k, v, return_lse=True, **options)
    assert same_bits(out, expected)
    assert torch.equal(lse.isneginf(), count[..., 0] == 0)
    torch.testing.assert_close(lse.double(), count[..., 0].double().log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_mean_of_integers(dtype, tokens):
    """Sums of integers are exact in any order and a power of two divides exactly: one rounding remains. An output,
    probability or sum rounded to the inputs' dtype on the way shows."""
    for keys in (1, 2, 64, 256, 1024, 4096):
        q = normal(1, tokens, 2, 16, dtype=DTYPES[dtype])
        k = torch.zeros(1, keys, 1, 16, dtype=q.dtype)
        v = torch.randint(-255, 256, (1, keys, 1, 33), generator=torch.Generator().manual_seed(keys)).to(q.dtype)
        expected = v.double().mean(1, keepdim=True).to(q.dtype).expand(1, tokens, 2, 33)
        assert same_bits(ops.attention(q, k, v), expected), keys


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_a_power_of_two(dtype, tokens):
    q = normal(1, tokens, 2, 16, dtype=DTYPES[dtype])
    k = torch.zeros(1, 400, 1, 16, dtype=q.dtype)
    v = torch.randint(-255, 256, (1, 400, 1, 20), generator=torch.Generator().manual_seed(1)).to(q.dtype)
    for window, sinks in ((64, 0), (128, 0), (1, 0), (120, 8), (28, 100)):
        rows = []
        for position in range(400 - tokens, 400):
            near = v[0, position - window + 1 : position + 1]
            rows.append(torch.cat([v[0, :sinks], near]).double().mean(0))
        expected = torch.stack(rows)[None].to(q.dtype).expand(1, tokens, 2, 20)
        assert same_bits(ops.attention(q, k, v, causal=True, window=window, num_sinks=sinks), expected), window


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 13, 17, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_needle(dtype, tokens):
    """The score of one key lies so far above all others that their weights vanish: its value comes back unchanged,
    wherever in a tile, a split or the rows it is met, and whatever came before it."""
    keys, heads, kv_heads, dim = 1300, 4, 2, 96
    signs = normal(1, keys, kv_heads, dim, seed=5).sign()
    v = normal(1, keys, kv_heads, 40, dtype=DTYPES[dtype], seed=6)
    places = torch.tensor([0, 1, 63, 64, 127, 128, 700, 1023, 1024, 1087, 1088, 1279, 1280, 1298, 1299])
    wanted = places[torch.arange(tokens * heads) * 7 % len(places)].view(tokens, heads)
    head_of = torch.arange(heads) // (heads // kv_heads)
    q = (64 * signs[0, wanted, head_of])[None].to(v.dtype)  # <q, k> is 64 * 96, or at most 64 * 60 or so
    out = ops.attention(q, signs.to(v.dtype), v, scale=0.25)
    assert same_bits(out, v[0, wanted, head_of][None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dimension_of_q_and_k_counts_once(dtype):
    """Scores that one dimension alone decides, for each head dim up to 70 and each dimension of it."""
    for dim in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 70):
        q = 256 * torch.eye(dim, dtype=DTYPES[dtype])[None, :, None]  # query i reads dimension i
        k = torch.stack([torch.zeros(dim, dim), torch.eye(dim)], 1).view(1, 2 * dim, 1, dim).to(q.dtype)
        v = torch.arange(2 * dim, dtype=q.dtype)[None, :, None, None]
        expected = v[:, 1::2].expand(1, dim, 1, 1)
        for rows in (slice(None), slice(0, 16), slice(dim - 1, dim)):  # both loops
            assert same_bits(ops.attention(q[:, rows], k, v, scale=1.0), expected[:, rows]), dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_heads_read_their_own_kv_head(dtype):
    """Values name their batch and head: the output must too."""
    for batch, kv_heads, group, tokens in ((2, 3, 1, 1), (2, 2, 4, 1), (3, 4, 2, 3), (2, 3, 7, 20)):
        heads = kv_heads * group
        names = torch.arange(batch * kv_heads).view(batch, 1, kv_heads, 1).to(DTYPES[dtype])
        q = normal(batch, tokens, heads, 8, dtype=DTYPES[dtype])
        k = torch.zeros(batch, 32, kv_heads, 8, dtype=q.dtype)
        out = ops.attention(q, k, names.expand(-1, 32, -1, 5))
        expected = names.repeat_interleave(group, 2).expand(-1, tokens, -1, 5)
        assert same_bits(out, expected.contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_queries_than_keys(dtype):
    """Positions below 0: causal rows see only the prefix, if any."""
    q, k = normal(1, 40, 2, 8, dtype=DTYPES[dtype]), torch.zeros(1, 8, 1, 8, dtype=DTYPES[dtype])
    v = torch.eye(8, dtype=q.dtype)[None, :, None]
    for prefix in (0, 4):
        out, lse = ops.attention(q, k, v, causal=True, prefix_lens=int32(prefix), return_lse=True)
        assert out[:, :32, :, prefix:].eq(0).all() and torch.equal(out[0, 39, 0], torch.full((8,), 0.125).to(q.dtype))
        assert out[:, :32, :, :prefix].eq(0.25).all() and lse[:, :32].isneginf().all() == (prefix == 0)
