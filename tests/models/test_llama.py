"""The decoder against Transformers: logits, gradients, greedy continuations, files in both directions."""

from __future__ import annotations

import pytest
import torch
from effops import ops
from effops.decoding import compare, generate
from effops.models import Llama, ModelConfig, load_model
from effops.models.names import row_orders
from effops.models.presets import qwen2_0_5b
from effops.models.weights import DecoderWeights

PROMPT_LENGTH = 23


@pytest.fixture
def pair(peer, tmp_path):
    """The peer and our model loaded from the peer's files."""
    peer.save_pretrained(tmp_path)
    return peer, load_model(tmp_path)


def prompts(model, count=2):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, model.config.vocab_size, (count, PROMPT_LENGTH), generator=generator)


@torch.no_grad()
def test_logits(pair):
    """In float64 equal up to the peer's float32 norms; in float32 about as exact as the peer itself."""
    peer, ours = pair
    tokens = prompts(ours)
    peer32, ours32 = peer(tokens).logits, ours(tokens)
    exact, peer64 = ours.double()(tokens), peer.double()(tokens).logits
    scale = exact.abs().max()
    norms = 3 * ours.config.num_hidden_layers + 1
    # The peer rounds each norm and router to float32 (2^-24, a few times); layers may amplify that by their gain.
    assert (peer64 - exact).abs().max() <= norms * 64 * 2**-24 * scale
    peer_error = (peer32.double() - exact).abs().max()
    assert (ours32.double() - exact).abs().max() <= 4 * peer_error + 2**-20 * scale


def test_greedy_continuations(pair):
    peer, ours = pair
    tokens = prompts(ours, count=1)
    theirs = peer.generate(tokens, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
    mine = generate(ours, tokens, max_new_tokens=24, return_logits=True)
    assert mine.logits is not None
    if ours.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        # Their frequencies change with the length, so keys in a cache differ from those of one whole pass:
        # teacher forcing cannot judge, the tokens must agree outright.
        assert mine.tokens[0] == theirs.sequences[0, PROMPT_LENGTH:].tolist()
        return
    verdict = compare(
        tokens[0].tolist(),
        mine.tokens[0],
        mine.logits[0],
        theirs.sequences[0, PROMPT_LENGTH:].tolist(),
        torch.stack(theirs.logits, 1)[0],
        ours.double(),
    )
    assert verdict.kind in ("identical", "near-tie"), verdict


@torch.no_grad()
def test_cached_steps_equal_the_whole(pair):
    """Chunks and single steps through the cache, with rows of different length, against one plain pass."""
    _, ours = pair
    if ours.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        ours.rotary.max_position_embeddings = 64  # keeps the frequencies of short sequences throughout
        ours.rotary.parameters = {**ours.rotary.parameters, "original_max_position_embeddings": 64}
        ours.rotary._tables = None
    tokens = prompts(ours)
    whole = ours(tokens)
    cache = ours.new_cache(2, PROMPT_LENGTH)
    for memory in (cache._k, cache._v):
        memory.fill_(torch.nan)
    parts = [ours(tokens[:, :9], cache), ours(tokens[:, 9:16], cache)]
    parts += [ours(tokens[:, i : i + 1], cache) for i in range(16, PROMPT_LENGTH)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for keep in (1, 3, PROMPT_LENGTH, 99):
        torch.testing.assert_close(ours(tokens, logits_to_keep=keep), whole[:, -keep:], rtol=1e-4, atol=1e-4)

    cache.reset()
    first = torch.stack([tokens[0, :8], torch.cat([tokens[1, :0].new_zeros(5), tokens[1, :3]])])
    logits = ours(first, cache, lengths=[8, 3])
    torch.testing.assert_close(logits[0], whole[0, :8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 5:], whole[1, :3], rtol=1e-4, atol=1e-4)
    second = torch.stack([tokens[0, 8:12], tokens[1, 3:7]])
    logits = ours(second, cache, logits_to_keep=2)
    torch.testing.assert_close(logits[0], whole[0, 10:12], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], whole[1, 5:7], rtol=1e-4, atol=1e-4)


def test_gradients(pair):
    """Of every parameter, in float64."""
    peer, ours = pair
    tokens = prompts(ours)
    peer, ours = peer.double(), ours.double()
    peer(tokens).logits.logsumexp(-1).sum().backward()
    ours(tokens).logsumexp(-1).sum().backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    mine, orders = ours.checkpoint_tensors(theirs.keys()), row_orders(ours.config)
    for name, expected in theirs.items():
        grad = mine[name][orders[name]] if name in orders else mine[name]
        assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name  # the peer's float32 norms


@torch.no_grad()
@pytest.mark.parametrize("shard", [1 << 30, 20_000])
def test_saved_files_load_in_transformers_and_here(pair, tmp_path, shard):
    transformers = pytest.importorskip("transformers", reason="transformers is the peer of this test")
    peer, ours = pair
    directory = tmp_path / "saved"
    ours.save_pretrained(directory, max_shard_bytes=shard)
    assert (directory / "model.safetensors.index.json").exists() == (shard == 20_000)
    assert not list(directory.glob(".*"))
    tokens = prompts(ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, expected in peer.state_dict().items():
        assert torch.equal(again.pop(name), expected), name
    assert not again
    assert torch.equal(load_model(directory)(tokens), ours(tokens))
    assert load_model(directory).config == ours.config


def test_a_smaller_save_replaces_the_shards(tmp_path):
    model = Llama.random(small())
    model.save_pretrained(tmp_path, max_shard_bytes=5_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def small(**changes) -> ModelConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    return ModelConfig(**{**fields, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_reduced_precision_stays_close(dtype):
    model = Llama.random(small(qk_norm=True, model_type="qwen3"), std=0.3, seed=3)
    tokens = torch.arange(20).view(2, 10)
    exact = model(tokens)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().max() <= 64 * torch.finfo(dtype).eps * exact.abs().max()


def test_random_is_repeatable_and_typed():
    a, b, c = (Llama.random(small(), seed=s, dtype=torch.bfloat16) for s in (1, 1, 2))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert all(p.dtype == torch.bfloat16 for p in a.parameters())


def test_qwen2_preset_has_the_published_size():
    with torch.device("meta"):
        model = Llama(qwen2_0_5b(), dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 494_032_768


@pytest.fixture
def steps_of(monkeypatch):
    """A function that runs something and says how many calls of the op ``decoder`` it made, and what came out."""
    calls, plain = [], ops.decoder
    monkeypatch.setattr(ops, "decoder", lambda *a, **k: calls.append(1) or plain(*a, **k))

    def run(function):
        calls.clear()
        result = function()
        return len(calls), result

    return run


@torch.no_grad()
@pytest.mark.parametrize("paged", [False, True])
def test_a_step_is_one_call_with_the_bits_of_its_modules(monkeypatch, steps_of, paged):
    model = Llama.random(small(num_hidden_layers=3))
    tokens = torch.arange(9)[None]

    def steps():
        cache = model.new_paged_cache(1, 8, 4) if paged else model.new_cache(1, 32)
        first = model(tokens, cache, logits_to_keep=1)
        return [first, model(tokens[:, :1], cache), model(tokens[:, :4], cache), *model.step(tokens[:, 3:5], cache)]

    count, whole = steps_of(steps)
    assert count == 3  # not the prefill, of whose last layer only the last token is asked for
    monkeypatch.setattr(DecoderWeights, "get", lambda self: None)
    count, parts = steps_of(steps)
    assert count == 0 and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@torch.no_grad()
def test_replaced_parameters_and_modules_are_seen(steps_of):
    """Whatever replaces a weight, the output is that of the model's modules; in one call where the op knows them."""
    model, tokens = Llama.random(small()), torch.arange(5)[None]

    def logits():
        return model(tokens, model.new_cache(1, 8))

    def check(calls: int) -> torch.Tensor:
        count, got = steps_of(logits)
        assert count == calls
        assert torch.equal(got, model.logits(model.hidden_states(tokens, model.new_cache(1, 8))))
        return got

    first, layer = check(1), model.layers[1]
    layer.mlp.down_proj.weight = torch.nn.Parameter(2 * layer.mlp.down_proj.weight)
    assert not torch.equal(check(1), first)
    swapped = {"layers.0.self_attn.o_proj.weight": 3 * model.layers[0].self_attn.o_proj.weight}
    before = logits()
    inside = torch.func.functional_call(model, swapped, (tokens, model.new_cache(1, 8)))
    assert not torch.equal(inside, before) and torch.equal(check(1), before)
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(layer.self_attn.o_proj.weight.shape[0]))
    check(0)  # one layer with a bias and one without
    layer.self_attn.o_proj.bias = None
    assert torch.equal(check(1), before)
    layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 0.5
    assert not torch.equal(check(0), before)
    for norm in (model.layers[0].input_layernorm, model.layers[0].post_attention_layernorm, model.norm):
        norm.eps = 0.5
    check(1)
    layer.self_attn.window = 2
    assert not torch.equal(check(1), before)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    check(1)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(50))
    check(0)
    model.lm_head.bias = None
    model.embed_tokens.weight = torch.nn.Parameter(2 * model.embed_tokens.weight)
    check(1)
    layer.mlp = torch.nn.Sequential()
    assert model._whole.get() is None


@torch.no_grad()
def test_pinned_weights_are_looked_up_once():
    model = Llama.random(small())
    whole, weight = model._whole, model.layers[0].mlp.down_proj.weight
    with model.pinned(), model.pinned():
        first = whole.get()
        model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(2 * weight)
        assert whole.get() is first
    assert whole.get()[9][0] is not weight and first[9][0] is weight


def test_lengths_need_a_cache():
    with pytest.raises(ValueError, match="Llama: lengths: expected a cache beside it, got None"):
        Llama.random(small())(torch.zeros(1, 3, dtype=torch.int64), lengths=[2])
