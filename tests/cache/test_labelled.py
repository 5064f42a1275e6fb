"""The labelled cache: a decode step is sparse attention over the tokens that its labels select, and the dense cache's
step wherever it may see all; calibration finds the channels that tell keys apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effops.cache import DenseKVCache, DenseLayer, LabelChannels, LabelledKVCache, TreeNodes, calibrate_channels
from effops.models import Llama, ModelConfig
from effops.reference import label_topk, sparse_attention
from effops.reference.bounds import sparse_attention_bound
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
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


def decode(model: Llama, cache: Any, prompt: Tensor, more: Tensor) -> Tensor:
    """The logits after the prompt and after each further token."""
    with torch.inference_mode():
        steps = [model(prompt, cache, logits_to_keep=1)]
        steps += [model(more[:, i : i + 1], cache) for i in range(more.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("dense_layers, budget", [(0, 100), (LAYERS, 20)])
def test_all_tokens_are_the_dense_cache(model, channels, bits, dense_layers, budget):
    """Bit for bit: within the budget, and in dense layers."""
    prompt, more = tokens(2, 50), tokens(2, 9, seed=1)
    options = {"channels": channels, "num_channels": 5, "bits": bits, "dense_layers": dense_layers, "budget": budget}
    got = decode(model, model.new_labelled_cache(2, 80, **options), prompt, more)
    with torch.inference_mode():
        plain = model.new_cache(2, 80)
        plain.layers = [_LayerByLayer(layer.k, layer.v) for layer in plain.layers]
        expected = decode(model, plain, prompt, more)
    assert same_bits(got, expected)


class _LayerByLayer(DenseLayer):
    """No dense layer by its type, so that no op runs the whole model at once."""


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_a_step_is_sparse_attention(channels, bits):
    """Over the first and last tokens and those of the largest scores, of each sequence's own length."""
    cache = LabelledKVCache(
        LAYERS, 2, 90, KV_HEADS, DIM, channels=channels, budget=24, num_channels=4, bits=bits, dense_layers=1, window=5
    )
    layer, lengths = cache.layers[1], [80, 33]
    assert all(x.channels.equal(channels.order[i, :, :4]) for i, x in enumerate(cache.layers))
    assert len({tuple(x.channels.flatten().tolist()) for x in cache.layers}) == LAYERS
    cache.advance(prefill := cache.plan(80, lengths))
    layer.append(normal(2, 80, KV_HEADS, DIM), normal(2, 80, KV_HEADS, DIM, seed=1), prefill)
    step = cache.plan(1)
    layer.append(normal(2, 1, KV_HEADS, DIM, seed=2), normal(2, 1, KV_HEADS, DIM, seed=3), step)
    q = normal(2, 1, HEADS, DIM, seed=4)
    got = layer.attend(q, step, window=None)
    named = {} if bits == 0 else {"scales": layer.scales}
    lists = label_topk(
        q, layer.labels, layer.channels, 24, kv_lens=step.kv_lens, num_sinks=4, window=5, bits=bits, **named
    )
    for length, row in zip(lengths, lists[:, 0].tolist(), strict=True):
        assert {*range(4), *range(length - 4, length + 1)} <= set(row)
    assert sparse_attention_bound(q, layer.k, layer.v, lists, kv_lens=step.kv_lens)[0].worst(got) <= 1
    dense = sparse_attention(q, layer.k, layer.v, torch.arange(34).int().expand(2, 1, 34), kv_lens=step.kv_lens)
    assert not torch.allclose(got[:1], dense[:1])


def test_trees_and_prompts_see_every_key(model, channels):
    """Of more tokens than the budget."""
    prompt, nodes = tokens(1, 60), tokens(1, 4, seed=3)
    tree = TreeNodes(ancestor_bits([-1, 0, 0, 1])[None], int32(0, 1, 1, 2)[None], 2)
    logits = []
    for c in (
        model.new_labelled_cache(1, 80, channels=channels, num_channels=4, budget=21, dense_layers=0),
        model.new_cache(1, 80),
    ):
        with torch.inference_mode():
            last = model(prompt, c, logits_to_keep=1)  # one row of queries in the last layer, of a prompt all the same
            logits.append(torch.cat([last, model(nodes, c, tree=tree)], 1))
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


def test_calibration_finds_planted_channels():
    """Keys and queries that are large in two channels of each head; only their products count where they meet."""

    class Model:
        config = CONFIG

        def new_cache(self, batch: int, capacity: int) -> DenseKVCache:
            return DenseKVCache(LAYERS, batch, capacity, KV_HEADS, DIM)

        def hidden_states(self, tokens: Tensor, cache: Any) -> None:
            step = cache.plan(tokens.shape[1])
            for i, layer in enumerate(cache.layers):
                k, q = normal(*tokens.shape, KV_HEADS, DIM, seed=i), normal(*tokens.shape, HEADS, DIM, seed=i + 9)
                k[:, :, :, i] *= 30
                q[:, :, 2:, i + 3] *= 900  # of the second KV head's queries
                layer.append(k, k, step)
                layer.attend(q, step)

    batches = [tokens(2, 30), tokens(1, 50)]
    orders = {s: calibrate_channels(Model(), batches, statistic=s).order for s in ("qk", "q", "k")}
    for i in range(LAYERS):
        assert orders["k"][i, :, 0].tolist() == [i, i]
        assert orders["q"][i, 1, 0] == i + 3 and orders["qk"][i, :, 0].tolist() == [i, i + 3]
        assert orders["qk"][i, 1, 1] == i and orders["qk"].sort(-1).values.equal(
            torch.arange(DIM).int().expand(LAYERS, KV_HEADS, DIM)
        )
    with pytest.raises(ValueError, match="calibrate_channels: statistic: expected qk, q or k, got 'v'"):
        calibrate_channels(Model(), batches, statistic="v")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibrate_channels: batches: expected one or more, got none"):
        calibrate_channels(Model(), [])


def test_every_batch_counts(model):
    """The order of batches does not matter, and ranges are those of all."""
    a, b = tokens(1, 30, seed=1), tokens(2, 20, seed=2)
    one, other, alone = (calibrate_channels(model, batches) for batches in ([a, b], [b, a], [a]))
    assert one.order.equal(other.order) and one.low.equal(other.low) and one.high.equal(other.high)
    assert (one.low <= alone.low).all() and (one.high >= alone.high).all() and (one.low < alone.low).any()


def test_every_token_counts_in_every_layer(model):
    """Ranges are those of the keys that a dense cache holds, in the last layer too."""
    prompt, cache = tokens(2, 40, seed=4), model.new_cache(2, 40)
    with torch.inference_mode():
        model.hidden_states(prompt, cache)
    found = calibrate_channels(model, [prompt])
    for i, layer in enumerate(cache.layers):
        assert torch.allclose(found.low[i], layer.k.amin((0, 1)), rtol=1e-4, atol=1e-4), i
        assert torch.allclose(found.high[i], layer.k.amax((0, 1)), rtol=1e-4, atol=1e-4), i


def test_channels_are_kept_in_a_file(channels, tmp_path):
    pytest.importorskip("safetensors", reason="channels are kept in a safetensors file")
    channels.save(tmp_path / "channels.safetensors")
    loaded = LabelChannels.load(tmp_path / "channels.safetensors")
    assert all(getattr(loaded, n).equal(getattr(channels, n)) for n in ("order", "low", "high"))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_channels": 0}, r"num_channels: expected a number in \[1, 8\], got 0"),
        ({"num_channels": 9}, r"num_channels: expected a number in \[1, 8\], got 9"),
        ({"bits": 3}, "bits: expected 0, 4 or 8, got 3"),
        ({"budget": 19}, "budget: expected num_sinks . window = 4 . 16 or more, window 1 or more, got 19"),
        ({"window": 0}, "budget: expected num_sinks . window = 4 . 0 or more, window 1 or more, got 30"),
    ],
)
def test_wrong_options(channels, changes, says):
    options: dict[str, Any] = {"channels": channels, "num_channels": 4, "budget": 30} | changes
    with pytest.raises(ValueError, match=f"LabelledKVCache: {says}"):
        LabelledKVCache(LAYERS, 1, 50, KV_HEADS, DIM, **options)
    with pytest.raises(ValueError, match=r"LabelledKVCache: channels: expected those of .+, got \(3, 2, 8\)"):
        LabelledKVCache(LAYERS + 1, 1, 50, KV_HEADS, DIM, channels=channels, num_channels=4, budget=30)


def test_bytes(channels):
    sizes = {"num_layers": LAYERS, "batch_size": 2, "capacity": 50, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    dense = DenseKVCache(**sizes, dtype=torch.bfloat16).nbytes
    for bits, a_token in ((0, 4 * 2), (8, 4), (4, 4)):
        labelled = LabelledKVCache(
            **sizes, dtype=torch.bfloat16, channels=channels, num_channels=4, budget=30, bits=bits
        )
        assert labelled.nbytes - dense == LAYERS * 2 * 50 * KV_HEADS * a_token
