"""Small models, and a drafter that knows what they will say: trees in which truth and noise are mixed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from effops.decoding import Draft, DraftContext, Drafter, Generation, TokenTree, compare, generate
from effops.models import Llama, ModelConfig, Tokenizer

VOCAB = 64
PROMPTS = [[3, 1, 4, 1, 5], [7], [60, 61, 2, 9, 9, 31, 8], [11, 12]]


def config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**fields, **changes})


MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window-qk-norm": {"model_type": "qwen3", "qk_norm": True, "windows": (5, None), "num_key_value_heads": 1},
    "windows": {"model_type": "mistral", "windows": (7, 7)},
}


def random_model(name: str = "grouped", *, seed: int = 1, **changes: Any) -> Llama:
    """Weights so large that ties of logits are improbable."""
    return Llama.random(config(**{**MODELS[name], **changes}), seed=seed, std=0.5)


class Mixture(Drafter):
    """Random trees of up to ``nodes`` nodes: a node under a right one is right with probability ``truth``; now and then
    no draft at all, or a root alone. Siblings may carry the same token."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], *, nodes: int = 9, truth: float = 0.8,
        seed: int = 0, vocab_size: int = VOCAB, absent: float = 0.1,
    ) -> None:  # fmt: skip
        self.whole = [[*ids, *new] for ids, new in zip(prompts, outputs, strict=True)]
        self.max_nodes, self.truth, self.absent, self.vocab_size = nodes, truth, absent, vocab_size
        self.random = random.Random(seed)

    def propose(self, context: DraftContext) -> list[Draft | None]:
        return [
            self.draft(whole, len(tokens), budget)
            for whole, tokens, budget in zip(self.whole, context.tokens, context.budgets, strict=True)
        ]

    def draft(self, whole: list[int], at: int, budget: int) -> Draft | None:
        if self.random.random() < self.absent:
            return None
        parents, tokens, right, depths = [-1], [0], {0}, [0]
        for node in range(1, self.random.randint(1, self.max_nodes)):
            deep = self.random.random() < 0.6
            parent = max(right) if deep else self.random.randrange(node)
            place = at + depths[parent]
            parents.append(parent)
            depths.append(depths[parent] + 1)
            if parent in right and place < len(whole) and self.random.random() < self.truth:
                tokens.append(whole[place])
                right.add(node)
            else:
                tokens.append(self.random.randrange(self.vocab_size))
        return Draft(tokens[1:], TokenTree(parents))


class Always(Drafter):
    """The same answer at each step, made by ``draft(tokens, budget)`` for each sequence."""

    def __init__(self, draft: Callable[[list[int], int], Draft | None], max_nodes: int = 64) -> None:
        self.make, self.max_nodes = draft, max_nodes

    def propose(self, context: DraftContext) -> list[Draft | None]:
        return [self.make(*known) for known in zip(context.tokens, context.budgets, strict=True)]


def words(vocab_size: int = VOCAB) -> Tokenizer:
    """A tokenizer of two-character words: 0 is 'a0', 26 'a1'."""
    import tokenizers

    alphabet = [chr(97 + i % 26) + str(i // 26) for i in range(vocab_size)]
    table = dict(zip(alphabet, range(vocab_size), strict=True))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, "a0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


def check_stats(got: Generation, plain: Generation) -> None:
    """The counts of a speculative run against each other and against the plain run's."""
    stats = got.stats
    lengths = stats.accepted_lengths
    assert stats.decode_tokens == sum(length * count for length, count in lengths.items())
    assert stats.decode_tokens == stats.new_tokens - len(got.tokens) == plain.stats.decode_tokens
    assert stats.sequence_steps == sum(lengths.values()) <= plain.stats.sequence_steps
    assert stats.steps <= plain.stats.steps and min(lengths, default=1) >= 1
    if stats.sequence_steps:
        assert stats.mean_accepted_length == stats.decode_tokens / stats.sequence_steps
    assert 0 <= stats.draft_seconds <= stats.decode_seconds


def check_lossless(
    model: Llama, prompts: Sequence[Sequence[int]], drafter: Drafter, *, plain: Generation | None = None,
    cache: Callable[[], Any] | None = None, **options: Any,
) -> Generation:  # fmt: skip
    """Speculative greedy decoding says what plain decoding does, in everything that a caller sees. A different token is
    allowed only where float64 calls it a near-tie; nothing else is compared then."""
    caches = [None, None] if cache is None else [cache(), cache()]
    plain = plain or generate(model, prompts, cache=caches[0], return_logits=True, **options)
    events: list[tuple[int, list[int], str]] = []
    got = generate(
        model, prompts, drafter=drafter, cache=caches[1], return_logits=True,
        callback=lambda *event: events.append(event), **options,
    )  # fmt: skip
    assert plain.logits is not None and got.logits is not None
    if got.tokens != plain.tokens:
        exact = copy.deepcopy(model).double()
        for ids, *run in zip(prompts, plain.tokens, plain.logits, got.tokens, got.logits, strict=True):
            assert run[0] == run[2] or compare(ids, *run, exact).kind == "near-tie"
        return got
    assert got.reasons == plain.reasons and got.texts == plain.texts
    for row, (tokens, text, a, b) in enumerate(zip(got.tokens, got.texts, got.logits, plain.logits, strict=True)):
        own = [event for event in events if event[0] == row]
        assert [token for event in own for token in event[1]] == tokens and all(event[1] for event in own)
        assert "".join(event[2] for event in own) == text
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if cache is not None:
        assert caches[1].lengths == caches[0].lengths
    check_stats(got, plain)
    return got
