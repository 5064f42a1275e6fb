"""The offloaded cache: the bits of the resident one, whatever was fetched in time; what is kept where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effops.cache import LabelChannels, LabelledKVCache, OffloadedKVCache, TreeNodes, calibrate_channels
from effops.cache.offloaded import fetch_rows
from effops.models import Llama, ModelConfig
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


@pytest.fixture(scope="module")
def channels(model: Llama) -> LabelChannels:
    return calibrate_channels(model, [tokens(1, 60, seed=5), tokens(2, 40, seed=6)])


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def caches(model: Llama, channels: LabelChannels, directory: Any, batch: int = 2) -> tuple[Any, Any]:
    options: dict[str, Any] = {
        "channels": channels, "num_channels": 3, "budget": 24, "dense_layers": 1, "num_sinks": 2, "window": 4,
    }  # fmt: skip
    return (
        model.new_offloaded_cache(batch, 120, directory=directory, **options),
        model.new_labelled_cache(batch, 120, **options),
    )


def fed(model: Llama, cache: Any, whole: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(whole[:, i : i + 1], cache) for i in range(whole.shape[1])], 1)


def test_offloaded_is_resident_bit_for_bit(model, channels, tmp_path):
    """Sequences of different length, one of them within the budget at first; a tree; a rollback; a reorder."""
    results = []
    tree = TreeNodes(ancestor_bits([-1, 0, 0])[None], int32(0, 1, 1)[None], 1)
    for cache in caches(model, channels, tmp_path):
        with torch.inference_mode():
            out = [model(tokens(2, 50), cache, lengths=[50, 15])[:, -1:]]
            out.append(fed(model, cache, tokens(2, 20, seed=1)))
            out.append(model(tokens(2, 3, seed=2), cache, tree=tree))
            cache.commit(SimpleNamespace(nodes=int32(0, 2, -1).expand(2, 3), count=int32(2, 2)))
            out.append(fed(model, cache, tokens(2, 6, seed=3)))
            cache.rollback([60, 33])
            out.append(fed(model, cache, tokens(2, 9, seed=4)))
            cache.reorder([1, 0])
            out.append(fed(model, cache, tokens(2, 9, seed=5)))
            cache.plan(1)  # a pass that breaks off: its keys are written, its tokens are not part of the cache
            cache.layers[0].append(normal(2, 1, KV_HEADS, DIM), normal(2, 1, KV_HEADS, DIM), cache.plan(1))
            out.append(fed(model, cache, tokens(2, 4, seed=6)))
            cache.reset()
            out.append(model(tokens(2, 40, seed=7), cache))
            out.append(fed(model, cache, tokens(2, 9, seed=8)))
        results.append(out)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_a_pass_that_broke_off_leaves_no_row_behind(channels, tmp_path):
    """The new token's row of a broken pass is never taken for the one that comes in its place."""
    options: dict[str, Any] = {"channels": channels, "num_channels": 3, "budget": 24, "dense_layers": 0, "window": 4}
    sizes = (LAYERS, 1, 60, KV_HEADS, DIM)
    offloaded, resident = OffloadedKVCache(*sizes, directory=tmp_path, **options), LabelledKVCache(*sizes, **options)
    outs = []
    for cache in (offloaded, resident):
        out = []
        step = cache.plan(40)
        for i, layer in enumerate(cache.layers):
            layer.append(normal(1, 40, KV_HEADS, DIM, seed=i), normal(1, 40, KV_HEADS, DIM, seed=10 + i), step)
        cache.advance(step)
        for attempt in range(4):
            step = cache.plan(1)
            for i, layer in enumerate(cache.layers):
                new = normal(1, 1, KV_HEADS, DIM, seed=20 + 7 * attempt + i)
                layer.append(new, new + 1, step)
                out.append(layer.attend(normal(1, 1, HEADS, DIM, seed=i), step))
            if attempt % 2:
                cache.advance(step)
        outs.append(torch.cat(out))
    assert same_bits(*outs)


def test_rows_are_fetched_ahead(model, channels, tmp_path):
    """From the second sparse step on: all that the last step selected, too, but the new token."""
    cache, _ = caches(model, channels, tmp_path, batch=1)
    with torch.inference_mode():
        model(tokens(1, 60), cache, logits_to_keep=1)
        fed(model, cache, tokens(1, 1, seed=1))
        sparse, rows = LAYERS - 1, KV_HEADS * 24
        assert (cache.traffic.prefetched, cache.traffic.waited_for) == (0, sparse * rows)
        fed(model, cache, tokens(1, 10, seed=2))
    traffic = cache.traffic
    assert traffic.prefetched + traffic.waited_for == 11 * sparse * rows
    # Layer 1 is the first sparse one: no layer before it starts its fetch.
    assert traffic.prefetched <= 10 * (sparse - 1) * (rows - KV_HEADS)
    assert 0.2 < traffic.hit_rate < 1


def test_what_is_kept_where(channels, tmp_path):
    options: dict[str, Any] = {"channels": channels, "num_channels": 4, "budget": 24, "window": 4}
    sizes = (LAYERS, 2, 1000, KV_HEADS, DIM)
    cache, resident = OffloadedKVCache(*sizes, directory=tmp_path, **options), LabelledKVCache(*sizes, **options)
    labels = LAYERS * 2 * 1000 * KV_HEADS * 4
    assert resident.nbytes == cache.file_nbytes + labels
    assert cache.nbytes == labels + 2 * 2 * KV_HEADS * 24 * 2 * DIM * 4
    assert not list(tmp_path.iterdir())  # the file has no name: it goes with the cache


def test_fetched_rows_are_the_listed_ones():
    k, v = normal(2, 9, 3, 4), normal(2, 9, 3, 5, seed=1)
    lists = int32(0, 3, 8, 1, 2, -1, 4, 5, 6, 0, 1, 2, 7, 8, -1, 3, 6, 7).view(2, 3, 3)
    rows = fetch_rows(k, v, lists)
    for b in range(2):
        for g in range(3):
            for s, token in enumerate(lists[b, g].tolist()):
                if token >= 0:
                    assert rows.k[b, g, s].equal(k[b, token, g]) and rows.v[b, g, s].equal(v[b, token, g])


def test_wrong_options(channels, tmp_path):
    options: dict[str, Any] = {"channels": channels, "num_channels": 4, "budget": 24, "window": 4}
    with pytest.raises(
        ValueError, match=r"OffloadedKVCache: directory: expected a directory that exists, got '.+nowhere'"
    ):
        OffloadedKVCache(LAYERS, 1, 50, KV_HEADS, DIM, directory=tmp_path / "nowhere", **options)
    with pytest.raises(ValueError, match="OffloadedKVCache: device: expected cpu, got cuda"):
        OffloadedKVCache(LAYERS, 1, 50, KV_HEADS, DIM, directory=tmp_path, device="cuda", **options)
