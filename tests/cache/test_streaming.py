"""Streaming caches: decoding has the results of attention under a mask over all keys, however the tokens came; windows
over everything are the dense cache; positions in the cache; what rings have lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effops import ops
from effops.cache import DenseKVCache, DuoKVCache, StreamingKVCache, TreeNodes
from effops.models import Llama, ModelConfig
from effops.nn import RotaryEmbedding
from effops.reference import rotary
from effops.reference.attention import masked_attention
from effops.reference.bounds import attention_bound
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=256,
)  # fmt: skip
SOME = torch.tensor([[True, False], [False, False], [True, True]])


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def fed(model: Llama, cache: Any, whole: Tensor, cuts: list[int]) -> Tensor:
    """The logits of every token, fed in pieces."""
    with torch.inference_mode():
        return torch.cat([model(piece, cache) for piece in whole.split(cuts, 1)], 1)


def masked(model: Llama, whole: Tensor, full_heads: Tensor, window: int, num_sinks: int) -> Tensor:
    """The logits under the streaming mask over all keys, without a cache."""

    class Layer:
        needs_queries = False

        def __init__(self, heads: Tensor) -> None:
            self.windows = torch.full((KV_HEADS,), window, dtype=torch.int32).masked_fill(heads, 0)

        def append(self, k: Tensor, v: Tensor, step: Any) -> None:
            self.kv = k, v

        def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Any) -> Tensor:
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 2)
            self.kv = ops.rotary(k, cos, sin, step.positions), v
            return ops.rotary(q, cos, sin, step.positions)

        def attend(self, q: Tensor, step: Any, **options: Any) -> Tensor:
            out = ops.attention(q, *self.kv, causal=True, head_windows=self.windows, num_sinks=num_sinks)
            assert isinstance(out, Tensor)
            return out

    class Cache(DenseKVCache):
        """None by its type, so that no op runs the whole model at once."""

    cache = Cache(LAYERS, *whole.shape, KV_HEADS, DIM)
    cache.layers = [Layer(heads) for heads in full_heads]  # type: ignore[misc]
    with torch.inference_mode():
        return model(whole, cache)


@pytest.mark.parametrize("full_heads", [None, SOME], ids=["streaming", "duo"])
@pytest.mark.parametrize(
    "cuts",
    [[1] * 90, [40] + [1] * 50, [7] * 12 + [6], [5, 1, 8, 1] * 6],
    ids=["single", "a prompt first", "sevens", "mixed"],
)
@pytest.mark.parametrize("page", [1, 4, 16])
def test_decoding_is_attention_under_the_mask(model, cuts, full_heads, page):
    """In pieces of one or more tokens, after a prompt longer than a ring; rings wrap around several times."""
    whole = tokens(2, 90)
    heads = torch.zeros(LAYERS, KV_HEADS, dtype=torch.bool) if full_heads is None else full_heads
    expected = masked(model, whole, heads, window=11, num_sinks=3)
    cache = model.new_streaming_cache(
        2, 96, window=11, num_sinks=3, full_heads=full_heads, step_tokens=8, page_size=page
    )
    got = fed(model, cache, whole, cuts)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    dense = fed(model, model.new_cache(2, 96), whole, cuts)
    assert not torch.allclose(dense, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["absolute", "cache"])
def test_a_window_over_everything_is_the_dense_cache(model, mode):
    whole = tokens(2, 60)
    cache = model.new_streaming_cache(2, 64, window=60, position_mode=mode, page_size=4)
    got, expected = (fed(model, c, whole, [33] + [1] * 27) for c in (cache, model.new_cache(2, 64)))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    duo = DuoKVCache(
        LAYERS, 2, 64, KV_HEADS, DIM, full_heads=torch.ones(LAYERS, KV_HEADS, dtype=torch.bool), window=1, num_sinks=0
    )
    assert torch.allclose(fed(model, duo, whole, [33] + [1] * 27), expected, rtol=1e-4, atol=1e-4)


def layer_of(mode: str, window: int = 6, sinks: int = 3, **options: Any) -> StreamingKVCache:
    turn = RotaryEmbedding(DIM, 256, {"rope_type": "default", "rope_theta": 100.0} | options)
    return StreamingKVCache(1, 2, 200, KV_HEADS, DIM, window=window, num_sinks=sinks, position_mode=mode,
                            rotary=turn, step_tokens=8, page_size=4)  # fmt: skip


@pytest.mark.parametrize("turned", [{}, {"partial_rotary_factor": 0.5}], ids=["all", "half"])
def test_positions_in_the_cache_are_keys_turned_again(turned):
    """Each step against the original recipe: keys kept unturned, turned by their place in the cache."""
    cache, generator = layer_of("cache", **turned), torch.Generator().manual_seed(0)
    layer, (cos, sin) = cache.layers[0], cache.rotary.tables(200, torch.device("cpu"))
    keys, values = (torch.empty(2, 0, KV_HEADS, DIM, dtype=torch.float64) for _ in range(2))
    for count in (2, 1, 5, 1, 1, 8, 1, 3, 1, 1):
        step = cache.plan(count)
        held = keys.shape[1]
        x = torch.randn(2, count, HEADS + 2 * KV_HEADS, DIM, generator=generator)
        q, k, v = x.split([HEADS, KV_HEADS, KV_HEADS], 2)
        first = held - cache.window + 1
        kept = list(range(held)) if first <= 3 else [0, 1, 2, *range(first, held)]
        seen, seen_v = (torch.cat([old[:, kept], new.double()], 1) for old, new in ((keys, k), (values, v)))
        keys, values = (torch.cat([old, new.double()], 1) for old, new in ((keys, k), (values, v)))
        places = torch.arange(seen.shape[1]).int().expand(2, -1)
        turned_k = rotary(seen, cos.double(), sin.double(), places)
        turned_q = rotary(q.double(), cos.double(), sin.double(), places[:, -count:])
        allowed = torch.ones(count, seen.shape[1], dtype=torch.bool).tril(seen.shape[1] - count)
        expected, _ = masked_attention(
            turned_q, turned_k, seen_v, allowed[None, None], torch.ones(2, seen.shape[1], dtype=torch.bool)
        )
        got = layer.attend(layer.rotary_append(x, cos, sin, step), step)
        cache.advance(step)
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5), held


def test_both_modes_see_the_same_keys_in_steps_of_one():
    """With keys that no rotation turns, for the angle is 0, the modes agree."""
    outs = []
    for mode in ("absolute", "cache"):
        cache = layer_of(mode)
        table = torch.ones(200, DIM // 2), torch.zeros(200, DIM // 2)
        cache.rotary = SimpleNamespace(tables=lambda *_, table=table: table)
        out = []
        for i in range(30):
            step = cache.plan(1)
            x = normal(2, 1, HEADS + 2 * KV_HEADS, DIM, seed=i)
            out.append(cache.layers[0].attend(cache.layers[0].rotary_append(x, *table, step), step))
            cache.advance(step)
        outs.append(torch.cat(out, 1))
    assert torch.allclose(*outs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full_heads", [None, SOME[:1]], ids=["streaming", "duo"])
def test_a_ragged_batch_is_its_sequences(full_heads):
    """Rows padded on the left, a prompt and steps: each row has the bits it has alone in pieces of the same sizes."""

    def run(batch: int, steps: list[tuple[int, list[int]]], rows: list[int]) -> list[list[Tensor]]:
        cache = StreamingKVCache(1, batch, 100, KV_HEADS, DIM, window=9, num_sinks=2, full_heads=full_heads,
                                 step_tokens=6, page_size=4)  # fmt: skip
        outs: list[list[Tensor]] = [[] for _ in range(batch)]
        for i, (count, lens) in enumerate(steps):
            step = cache.plan(count, lens)
            q, k, v = (normal(3, count, h, DIM, seed=10 * i + h)[rows] for h in (HEADS, KV_HEADS, KV_HEADS))
            cache.layers[0].append(k, v + 1, step)
            out = cache.layers[0].attend(q, step)
            cache.advance(step)
            for own, x, n in zip(outs, out, lens, strict=True):
                own.append(x[count - n :])
        return outs

    steps = [(30, [30, 7, 0]), (1, [1, 1, 1]), (5, [2, 5, 3]), (1, [1, 0, 1]), (6, [6, 6, 1]), (1, [1, 1, 1])]
    together = run(3, steps, [0, 1, 2])
    for b in range(3):
        (alone,) = run(1, [(count, [lens[b]]) for count, lens in steps], [b])
        for x, y in zip(together[b], alone, strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_trees_and_commits(model):
    """A tree of draft tokens over rings, then the accepted path, against feeding the path."""
    prompt, nodes = tokens(2, 40), tokens(2, 5, seed=3)
    tree = TreeNodes(ancestor_bits([-1, 0, 0, 1, 2])[None], int32(0, 1, 1, 2, 2)[None], 2)
    path = [0, 2, 4]
    options: dict[str, Any] = {"window": 12, "full_heads": SOME, "step_tokens": 8, "page_size": 4}
    with torch.inference_mode():
        cache, plain = (model.new_streaming_cache(2, 96, **options) for _ in range(2))
        model(prompt, cache), model(prompt, plain)
        logits = model(nodes, cache, tree=tree)
        cache.commit(SimpleNamespace(nodes=int32(*path, -1, -1).expand(2, 5), count=int32(3, 3)))
        expected = model(nodes[:, path], plain)
        assert torch.allclose(logits[:, path], expected, rtol=1e-4, atol=1e-4)
        more = tokens(2, 20, seed=4)
        after, plain_after = (fed(model, c, more, [1] * 20) for c in (cache, plain))
    assert torch.allclose(after, plain_after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("back", [1, 5, 8])
def test_rollback_within_the_slack(model, back):
    whole, other = tokens(2, 70), tokens(2, 9, seed=5)
    options: dict[str, Any] = {"window": 12, "step_tokens": 8, "page_size": 4}
    cache, plain = (model.new_streaming_cache(2, 96, **options) for _ in range(2))
    fed(model, cache, whole, [1] * 70)
    cache.rollback([70 - back] * 2)
    fed(model, plain, whole[:, : 70 - back], [1] * (70 - back))
    assert torch.allclose(*(fed(model, c, other, [1] * 9) for c in (cache, plain)), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"StreamingKVCache: lengths: expected 0 or at least \d+ for sequence 0, whose"
    ):
        cache.rollback([30, 79 - back])
    assert cache.lengths == [79 - back] * 2
    cache.rollback([0, 79 - back])
    cache.reset()
    start = whole[:, :30]
    assert same_bits(*(fed(model, c, start, [30]) for c in (cache, model.new_streaming_cache(2, 96, **options))))


def test_reorder_moves_rings(model):
    whole, options = tokens(3, 50), {"window": 12, "full_heads": SOME, "page_size": 4}
    cache = model.new_streaming_cache(3, 64, **options)
    fed(model, cache, whole, [30] + [1] * 20)
    rows = [2, 0, 0]
    cache.reorder(rows)
    expected = model.new_streaming_cache(3, 64, **options)
    fed(model, expected, whole[rows], [30] + [1] * 20)
    more = tokens(3, 5, seed=2)
    assert torch.allclose(*(fed(model, c, more, [1] * 5) for c in (cache, expected)), rtol=1e-5, atol=1e-5)


def test_bytes_do_not_grow():
    """Of a streaming head: sinks and ring, whatever the capacity."""

    def nbytes(capacity: int, full: Tensor | None = None) -> int:
        return StreamingKVCache(
            LAYERS, 2, capacity, KV_HEADS, DIM, window=32, num_sinks=4, step_tokens=1, full_heads=full
        ).nbytes

    page = 2 * LAYERS * 2 * KV_HEADS * 16 * DIM * 4
    assert nbytes(1000) == nbytes(10000) == 3 * page
    half = torch.tensor([True, False]).expand(LAYERS, 2)
    assert nbytes(1024, half) == (3 + 64) * page // 2


def test_within_the_bound_of_masked_attention():
    """In bfloat16, the last of many steps over all keys it may see."""
    cache = StreamingKVCache(1, 1, 300, KV_HEADS, 32, window=70, num_sinks=5, dtype=torch.bfloat16, page_size=8)
    k, v, q = (normal(1, n, h, 32, dtype=torch.bfloat16, seed=h + n) for n, h in ((250, 2), (250, 2), (250, HEADS)))
    for i in range(250):
        step = cache.plan(1)
        cache.layers[0].append(k[:, i : i + 1], v[:, i : i + 1], step)
        got = cache.layers[0].attend(q[:, i : i + 1], step)
        cache.advance(step)
    bound, _ = attention_bound(q[:, -1:], k, v, causal=True, window=70, num_sinks=5)
    assert bound.worst(got) <= 1


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"window": 0}, "window: expected 1 or more, got 0"),
        ({"num_sinks": -1}, "num_sinks: expected 0 or more, got -1"),
        ({"step_tokens": 0}, "step_tokens: expected 1 or more, got 0"),
        ({"page_size": 0}, "page_size: expected 1 or more, got 0"),
        ({"position_mode": "relative"}, "position_mode: expected absolute or cache, got 'relative'"),
        ({"position_mode": "cache"}, "position_mode: expected absolute without rotary, or beside full heads, got"),
        ({"full_heads": SOME[:2]}, r"full_heads: expected torch.bool \(3, 2\), got torch.bool \(2, 2\)"),
        ({"full_heads": SOME.float()}, r"full_heads: expected torch.bool \(3, 2\), got torch.float32 \(3, 2\)"),
    ],
)
def test_wrong_options(changes, says):
    with pytest.raises(ValueError, match=f"StreamingKVCache: {says}"):
        StreamingKVCache(LAYERS, 1, 50, KV_HEADS, DIM, **{"window": 8} | changes)


def test_wrong_calls(model):
    cache = model.new_streaming_cache(1, 64, window=8, step_tokens=4)
    fed(model, cache, tokens(1, 6), [6])
    with pytest.raises(
        ValueError, match="StreamingKVCache: tokens: expected at most 4 new tokens beside tokens held, got 5"
    ):
        cache.plan(5)
    tree = TreeNodes(ancestor_bits([-1, 0, 0, 0, 0])[None], int32(0, 1, 1, 1, 1)[None], 1)
    with pytest.raises(ValueError, match="StreamingKVCache: tokens: expected at most 4 nodes, got 5"):
        cache.plan(5, tree=tree)
    with pytest.raises(ValueError, match="StreamingKVCache: window: expected layers without one of their own, got 3"):
        cache.layers[0].attend(normal(1, 1, HEADS, DIM), cache.plan(1), window=3)
