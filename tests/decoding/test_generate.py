"""The generation loop: against a plain loop, in batches, with every way to end, with text and callbacks."""

from __future__ import annotations

import pytest
import torch
from effops.decoding import Sampler, generate
from effops.models import Llama, ModelConfig, Tokenizer

VOCAB = 64


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40,
    )
    return Llama.random(config, seed=1, std=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="text in and out needs the tokenizers library")
    alphabet = [chr(97 + i % 26) + str(i // 26) for i in range(VOCAB)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(alphabet, range(VOCAB), strict=True)), "a0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


PROMPT = [3, 1, 4, 1, 5]


@torch.no_grad()
def plain(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_equals_the_plain_loop(model):
    result = generate(model, PROMPT, max_new_tokens=12, return_logits=True)
    assert result.tokens == [plain(model, PROMPT, 12)] and result.reasons == ["length"]
    with torch.no_grad():
        whole = model(torch.tensor([PROMPT + result.tokens[0]]))[0, 4:-1]
    torch.testing.assert_close(result.logits[0], whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.argmax(-1), torch.tensor(result.tokens[0]))


def test_stats(model):
    stats = generate(model, [PROMPT, PROMPT[:2]], max_new_tokens=6).stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_tokens) == (7, 12, 10)
    assert (stats.steps, stats.sequence_steps, stats.mean_accepted_length) == (5, 10, 1.0)
    assert stats.prefill_seconds > 0 and stats.decode_tokens_per_second > 0 and stats.tokens_per_second > 0
    once = generate(model, PROMPT, max_new_tokens=1).stats
    assert (once.steps, once.mean_accepted_length, once.decode_tokens_per_second) == (0, 0.0, 0.0)


def test_a_batch_is_its_prompts_one_by_one(model):
    prompts = [PROMPT, [7], PROMPT * 3, [60, 61]]
    together = generate(model, prompts, max_new_tokens=9)
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert generate(model, prompt, max_new_tokens=9).tokens == [tokens]
    as_tensor = generate(model, torch.tensor([PROMPT, PROMPT]), max_new_tokens=4)
    assert as_tensor.tokens == [together.tokens[0][:4]] * 2


def test_rows_end_at_different_steps(model):
    prompts = [PROMPT, [7], [60, 61]]
    free = generate(model, prompts, max_new_tokens=10).tokens
    stop = free[1][2]
    result = generate(model, prompts, max_new_tokens=10, stop=[stop])
    for got, whole, reason in zip(result.tokens, free, result.reasons, strict=True):
        expected = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert got == expected and reason == ("stop" if stop in whole else "length")
    assert result.stats.new_tokens == sum(map(len, result.tokens))


def test_end_of_text(model):
    token = plain(model, PROMPT, 3)[2]
    model.config.eos_token_ids = (token,)
    try:
        assert generate(model, PROMPT, max_new_tokens=8).tokens[0][-1] == token
        assert len(generate(model, PROMPT, max_new_tokens=8, ignore_eos=True).tokens[0]) == 8
    finally:
        model.config.eos_token_ids = ()


def test_the_context_ends_it(model):
    prompt = [1] * 38
    result = generate(model, prompt, max_new_tokens=50)
    assert result.reasons == ["context"] and len(result.tokens[0]) == 3  # the last is never fed back
    assert len(generate(model, [1] * 40, max_new_tokens=50).tokens[0]) == 1
    with pytest.raises(ValueError, match=r"generate: prompt: expected at most 40 tokens .*, got 41"):
        generate(model, [1] * 41, max_new_tokens=1)


def test_sampling_repeats_with_its_generator(model):
    def run(seed):
        sampler = Sampler(temperature=1.5, generator=torch.Generator().manual_seed(seed))
        return generate(model, PROMPT, max_new_tokens=15, sampler=sampler).tokens

    assert run(1) == run(1) != run(2)


def test_text_streaming_and_stop_strings(model, tokenizer):
    text = tokenizer.decode(PROMPT)
    free = generate(model, tokenizer.decode(PROMPT[:1]), max_new_tokens=8, tokenizer=tokenizer)
    assert free.texts[0] == tokenizer.decode(free.tokens[0]) and text
    whole = free.texts[0]
    stop = whole[5:8]  # begins inside one token and ends inside another
    events = []
    result = generate(
        model,
        tokenizer.decode(PROMPT[:1]),
        max_new_tokens=8,
        tokenizer=tokenizer,
        stop=[stop],
        callback=lambda *event: events.append(event),
    )
    assert result.texts[0] == whole[: whole.index(stop)] and result.reasons == ["stop"]
    assert "".join(e[2] for e in events) == result.texts[0]
    assert [t for e in events for t in e[1]] == result.tokens[0] and {e[0] for e in events} == {0}
    assert len(result.tokens[0]) < 8


def test_text_held_back_for_a_stop_string_comes_at_the_end(model, tokenizer):
    whole = generate(model, "d0", max_new_tokens=4, tokenizer=tokenizer).texts[0]
    result = generate(model, "d0", max_new_tokens=4, tokenizer=tokenizer, stop=[whole[-2:] + "never"])
    assert result.texts[0] == whole and result.reasons == ["length"]


def test_continues_what_a_cache_holds(model):
    cache = model.new_cache(1, 40)
    first = generate(model, PROMPT, max_new_tokens=4, cache=cache)
    assert cache.lengths == [8]
    second = generate(model, first.tokens[0][-1:], max_new_tokens=4, cache=cache)
    assert first.tokens[0] + second.tokens[0] == plain(model, PROMPT, 8)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt: expected at least one token, got none"),
        ([[1], []], {}, "prompt: expected at least one token, got none"),
        ([1, 64], {}, "prompt: expected token ids from 0 to 63, got 64"),
        ([-1], {}, "prompt: expected token ids from 0 to 63, got -1"),
        ("text", {}, "tokenizer: expected one beside a text prompt, got None"),
        ([1], {"stop": ["x"]}, "tokenizer: expected one beside stop strings, got None"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(model, prompt, options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(model, prompt, **{"max_new_tokens": 1, **options})


def test_a_cache_of_another_size(model):
    with pytest.raises(ValueError, match="generate: cache: expected one of batch size 1, got 2"):
        generate(model, [1], max_new_tokens=1, cache=model.new_cache(2, 8))
    with pytest.raises(ValueError, match="DenseKVCache: tokens: expected at most 4 a sequence, got 5"):
        generate(model, PROMPT, max_new_tokens=1, cache=model.new_cache(1, 4))
