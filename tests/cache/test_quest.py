"""The cache of page bounds: a decode step is sparse attention over the pages that its bounds select, and the dense
cache's step wherever it may see all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effops.cache import DenseKVCache, DenseLayer, QuestKVCache, TreeNodes
from effops.models import Llama, ModelConfig
from effops.reference import page_topk, sparse_attention
from effops.reference.bounds import sparse_attention_bound
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 3, 4, 2, 8, 4
CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=256,
)  # fmt: skip
FEW: dict[str, Any] = {"page": PAGE, "budget": 24, "num_sinks": 3, "window": 5}


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def decode(model: Llama, cache: Any, prompt: Tensor, more: Tensor) -> Tensor:
    """The logits after the prompt and after each further token."""
    with torch.inference_mode():
        steps = [model(prompt, cache, logits_to_keep=1)]
        steps += [model(more[:, i : i + 1], cache) for i in range(more.shape[1])]
    return torch.cat(steps, 1)


class _LayerByLayer(DenseLayer):
    """No dense layer by its type, so that no op runs the whole model at once."""


@pytest.mark.parametrize("dense_layers, budget", [(0, 60), (0, 100), (LAYERS, 24)])
def test_all_tokens_are_the_dense_cache(model, dense_layers, budget):
    """Bit for bit: within the budget, its last token counted, and in dense layers."""
    prompt, more = tokens(2, 51), tokens(2, 9, seed=1)
    options = FEW | {"dense_layers": dense_layers, "budget": budget}
    got = decode(model, model.new_quest_cache(2, 80, **options), prompt, more)
    plain = model.new_cache(2, 80)
    plain.layers = [_LayerByLayer(layer.k, layer.v) for layer in plain.layers]
    assert same_bits(got, decode(model, plain, prompt, more))


def filled(lengths: list[int], **options: Any) -> QuestKVCache:
    """A cache of a prompt and a token of each layer's own."""
    cache = QuestKVCache(LAYERS, len(lengths), 90, KV_HEADS, DIM, **FEW | options)
    batch, prefill = len(lengths), cache.plan(max(lengths), lengths)
    for i, layer in enumerate(cache.layers):
        shape = (batch, max(lengths), KV_HEADS, DIM)
        layer.append(normal(*shape, seed=2 * i), normal(*shape, seed=2 * i + 1), prefill)
    cache.advance(prefill)
    return cache


def holds_the_bounds(cache: QuestKVCache, exact: bool = False) -> None:
    """Of every page its keys lie within them, or their least and largest are they."""
    for layer in cache.layers:
        for b, length in enumerate(cache.lengths):
            for j, first in enumerate(range(0, length, PAGE)):
                keys = layer.k[b, first : min(length, first + PAGE)]
                low, high = layer.low[b, j], layer.high[b, j]
                assert (low <= keys.amin(0)).all() and (high >= keys.amax(0)).all()
                assert not exact or (low.equal(keys.amin(0)) and high.equal(keys.amax(0)))


def test_a_step_is_sparse_attention():
    """Over the pages of the first and last tokens and those of the largest bounds, of each sequence's own length."""
    cache = filled([80, 33], dense_layers=1)
    step, layer = cache.plan(1), cache.layers[1]
    layer.append(normal(2, 1, KV_HEADS, DIM, seed=12), normal(2, 1, KV_HEADS, DIM, seed=13), step)
    q = normal(2, 1, HEADS, DIM, seed=14)
    got = layer.attend(q, step, window=None)
    lists = page_topk(q, layer.low, layer.high, 6, PAGE, kv_lens=step.kv_lens, num_sinks=3, window=5)
    for length, row in zip([80, 33], lists[:, 0].tolist(), strict=True):
        assert {*range(4), *range(length - 4, length + 1)} <= set(row)
    assert sparse_attention_bound(q, layer.k, layer.v, lists, kv_lens=step.kv_lens)[0].worst(got) <= 1
    dense = sparse_attention(q, layer.k, layer.v, torch.arange(34).int().expand(2, 1, 34), kv_lens=step.kv_lens)
    assert not torch.allclose(got[:1], dense[:1])
    assert cache.layers[0].budget == 0 and layer.budget == cache.layers[2].budget == 24


def test_the_page_of_a_planted_key_is_chosen():
    """A key that a query is large on, anywhere; the token before it in its page comes with it."""
    for at in (9, 30, 61):
        cache = filled([80], dense_layers=0)
        q, step = normal(1, 1, HEADS, DIM, seed=3), cache.plan(1)
        for layer in cache.layers:
            layer.append(normal(1, 1, KV_HEADS, DIM, seed=4), normal(1, 1, KV_HEADS, DIM, seed=5), step)
            again = SimpleNamespace(slots=int32(at)[None])
            layer.append(30 * q[:, :, ::2], normal(1, 1, KV_HEADS, DIM, seed=6), again)
            lists = layer._select(q, step)
            assert all({at - at % PAGE, at} <= set(row) for row in lists[0].tolist())


def test_bounds_are_those_of_the_keys():
    """Exactly while tokens are only appended; never narrower after trees, rollbacks and reordering."""
    cache = filled([30, 41])
    holds_the_bounds(cache, exact=True)
    cache.rollback([17, 38])
    holds_the_bounds(cache)
    step = cache.plan(9)
    for layer in cache.layers:
        layer.append(*(normal(2, 9, KV_HEADS, DIM, seed=s) / 4 for s in (30, 31)), step)
    cache.advance(step)
    holds_the_bounds(cache)
    cache.reorder([1, 1])
    holds_the_bounds(cache)
    parents = [-1, 0, 0, 1, 2, 3]
    step = cache.plan(6, tree=TreeNodes(ancestor_bits(parents)[None], int32(0, 1, 1, 2, 2, 3)[None], 3))
    for layer in cache.layers:
        layer.append(*(9 * normal(2, 6, KV_HEADS, DIM, seed=s) for s in (32, 33)), step)
    cache.advance(step)
    accepted = int32(0, 2, 4, -1, -1, -1, 0, 1, 3, 5, -1, -1).view(2, 6)
    cache.commit(SimpleNamespace(nodes=accepted, count=int32(3, 4)))
    assert cache.lengths == [50, 51]
    holds_the_bounds(cache)
    cache.reset()
    assert cache.lengths == [0, 0]
    step = cache.plan(7)
    for layer in cache.layers:
        layer.append(*(normal(2, 7, KV_HEADS, DIM, seed=s) / 9 for s in (34, 35)), step)
    cache.advance(step)
    holds_the_bounds(cache, exact=True)  # pages began anew


def test_trees_and_prompts_see_every_key(model):
    """Of more tokens than the budget."""
    prompt, nodes = tokens(1, 60), tokens(1, 4, seed=3)
    tree = TreeNodes(ancestor_bits([-1, 0, 0, 1])[None], int32(0, 1, 1, 2)[None], 2)
    logits = []
    for c in (model.new_quest_cache(1, 80, **FEW, dense_layers=0), model.new_cache(1, 80)):
        with torch.inference_mode():
            last = model(prompt, c, logits_to_keep=1)  # one row of queries in the last layer, of a prompt all the same
            logits.append(torch.cat([last, model(nodes, c, tree=tree)], 1))
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"page": 0}, "page: expected 1 or more tokens, got 0"),
        ({"budget": 26}, "budget: expected a multiple of page = 4 tokens, 12 or more, got 26"),
        ({"budget": 8}, "budget: expected a multiple of page = 4 tokens, 12 or more, got 8"),
        ({"window": 6, "budget": 12}, "budget: expected a multiple of page = 4 tokens, 16 or more, got 12"),
        ({"window": 0}, "window: expected 1 or more, and num_sinks 0 or more, got 0 and 3"),
        ({"num_sinks": -1}, "window: expected 1 or more, and num_sinks 0 or more, got 5 and -1"),
    ],
)
def test_wrong_options(changes, says):
    with pytest.raises(ValueError, match=f"QuestKVCache: {says}"):
        QuestKVCache(LAYERS, 1, 50, KV_HEADS, DIM, **FEW | changes)


def test_bytes():
    """Two keys a page, the last one included that is not whole."""
    sizes = {"num_layers": LAYERS, "batch_size": 2, "capacity": 50, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    dense = DenseKVCache(**sizes, dtype=torch.bfloat16).nbytes
    quest = QuestKVCache(**sizes, dtype=torch.bfloat16, **FEW)
    assert quest.nbytes - dense == LAYERS * 2 * 13 * KV_HEADS * 2 * DIM * 2


def test_empty_caches():
    for sizes in ((LAYERS, 0, 50), (0, 2, 50), (LAYERS, 2, 0)):
        cache = QuestKVCache(*sizes, KV_HEADS, DIM, **FEW)
        cache.reorder(range(sizes[1]))
        cache.rollback([0] * sizes[1])
        assert cache.lengths == [0] * sizes[1]
