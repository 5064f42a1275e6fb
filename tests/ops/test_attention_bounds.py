"""``attention`` against the exact result in float64, within derived bounds: drawn calls, and the places where the
schedule changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops
from effops.reference.bounds import attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import dense
from strategies.layouts import heads_major
from strategies.values import DTYPES, KINDS, int32, normal, values
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def worst(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> float:
    """The larger ratio of error to bound of out and lse."""
    got = ops.attention(q, k, v, return_lse=True, **options)
    assert got[0].dtype == q.dtype and got[0].is_contiguous() and got[1].is_contiguous()
    return max(bound.worst(x) for bound, x in zip(attention_bound(q, k, v, **options), got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(dense(DTYPES[dtype]))
    assert worst(*case.tensors, **case.options) <= 1


# Keys a tile 64; rows that stream 16 up to D = 64 and 40 beyond, in groups of 8 or 4, .., then 2 or 1; rows a block
# 96; tiles a split 16 while streaming, 64 in blocks of up to 512 rows. On devices 16 rows stream, blocks have 64
# (float32: 16), and a split 4 tiles or more, up to 64 splits while streaming, 16 in blocks.
SHAPES = {  # T, L, H, G, D, Dv
    "one key": (1, 1, 1, 1, 64, 64),
    "a tile less one": (1, 63, 2, 1, 64, 64),
    "a tile": (1, 64, 2, 1, 64, 64),
    "a tile and one": (1, 65, 3, 1, 64, 64),
    "5 streamed rows": (1, 129, 5, 1, 128, 128),
    "16 streamed rows": (4, 200, 8, 2, 64, 96),
    "17 rows, a block": (17, 200, 2, 2, 64, 96),
    "40 streamed rows of wide heads": (10, 200, 8, 2, 65, 96),
    "41 rows of wide heads, a block": (41, 200, 2, 2, 65, 96),
    "two splits": (1, 1025, 4, 1, 64, 64),
    "three splits, the last one short": (2, 2063, 2, 1, 40, 24),
    "20 heads on one KV head, a block of one token": (1, 200, 20, 1, 64, 64),
    "100 heads on one KV head": (1, 1100, 100, 1, 24, 16),
    "96 rows": (24, 130, 4, 1, 64, 64),
    "97 rows": (97, 130, 2, 2, 64, 64),
    "200 rows, one head": (200, 200, 1, 1, 32, 32),
    "two splits of a block": (17, 4200, 1, 1, 16, 16),
    "512 rows in splits": (128, 4100, 4, 1, 8, 8),
    "516 rows without splits": (129, 4100, 4, 1, 8, 8),
    "two blocks of 64 rows, two splits": (20, 330, 8, 2, 64, 64),
    "more than 64 splits of four tiles": (1, 17000, 2, 1, 8, 8),
    "widest": (2, 70, 2, 1, 256, 256),
    "narrowest": (2, 70, 2, 1, 1, 1),
    "D above Dv": (20, 70, 2, 1, 200, 3),
    "Dv above D": (20, 70, 2, 1, 3, 200),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_schedule_changes(dtype, shape, causal):
    tokens, capacity, heads, kv_heads, dim, v_dim = SHAPES[shape]
    q = values(1, tokens, heads, dim, dtype=DTYPES[dtype], seed=1)
    k, v = (values(1, capacity, kv_heads, d, dtype=q.dtype, seed=d, kind="spikes") for d in (dim, v_dim))
    assert worst(q, heads_major(k), heads_major(v), causal=causal) <= 1


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_over_many_tiles_and_splits(dtype, tokens):
    q = normal(3, tokens if tokens < 40 else sized(40, 7), 6, 32, dtype=DTYPES[dtype])
    k, v = (normal(3, 4500, 2, d, dtype=q.dtype, seed=d) for d in (32, 24))
    options = {"kv_lens": int32(4500, 4100, 1100), "kv_starts": int32(0, 70, 1), "causal": True}
    assert worst(q, k, v, **options, window=3000, num_sinks=100) <= 1
    assert worst(q, k, v, **options, head_windows=int32(1500, 0), num_sinks=3, sink_logits=normal(6, seed=3)) <= 1
    assert worst(q, k, v, **options, prefix_lens=int32(4400, 0, 1100), softcap=2.0, scale=0.5) <= 1


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("rising", [False, True], ids=["falling", "rising"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_score_rises_or_falls_from_tile_to_tile(dtype, rising, tokens):
    """Each tile's scores lie 3 from the last one's, with the best key anywhere: sums and outputs rescale at each."""
    q = torch.ones(1, tokens, 2, 8, dtype=DTYPES[dtype])
    level = torch.arange(1200) // 64 * (3.0 if rising else -3.0)
    k = (normal(1, 1200, 1, 8) + level[:, None, None] / 8).to(q.dtype)
    assert worst(q, k, normal(1, 1200, 1, 16, dtype=q.dtype), scale=1.0) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, tokens, kind):
    q, k, v = (
        values(2, n, h, 64, dtype=DTYPES[dtype], seed=n, kind=kind) for n, h in ((tokens, 4), (150, 2), (150, 2))
    )
    for options in ({}, {"scale": 1.0}, {"softcap": 5.0}, {"scale": 1.0, "softcap": 30.0}):
        assert worst(q, k, v, causal=True, **options) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_infinity_where_scores_are_huge(dtype):
    """Scores near 1e30 (float16: 1e9): the softmax is one-hot and finite."""
    big = 2.0**14 if dtype == "f16" else 2.0**49
    q = torch.full((1, 2, 2, 4), big, dtype=DTYPES[dtype])
    k = big * torch.arange(-70, 70, dtype=torch.float64)[None, :, None, None].expand(1, -1, 1, 4) / 128
    v = normal(1, 140, 1, 8, dtype=q.dtype)
    out, lse = ops.attention(q, k.to(q.dtype), v, return_lse=True)
    assert torch.equal(out, v[:, -1:].expand(1, 2, 2, 8)) and lse.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_nothing(sizes, sinks):
    """No sequence, no query or no key: results of the right shape, the empty set in every row."""
    batch, tokens, capacity = sizes
    options = {"sink_logits": torch.tensor([0.5, -2.0])} if sinks else {}
    q, k, v = normal(batch, tokens, 2, 8), normal(batch, capacity, 1, 8), normal(batch, capacity, 1, 4)
    assert worst(q, k, v, causal=True, **options) <= 1
    out, lse = ops.attention(q, k, v, return_lse=True, kv_lens=torch.zeros(batch, dtype=torch.int32), **options)
    assert out.shape == (batch, tokens, 2, 4) and out.eq(0).all()
    assert torch.equal(lse, (options["sink_logits"] if sinks else torch.full((2,), -torch.inf)).expand(lse.shape))
