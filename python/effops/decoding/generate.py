"""The generation loop over a KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops.cache import KVCache
from effops.decoding.draft import Drafter
from effops.decoding.run import Callback, Row, Run
from effops.decoding.sampler import Sampler
from effops.decoding.speculation import MAX_NODES
from effops.decoding.stats import GenerationStats
from effops.decoding.stop import StopStrings
from effops.models import Llama, Tokenizer

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass
class Generation:
    """The new tokens of each sequence, their text, and why each ended: 'stop', 'length' or 'context'.

    ``texts`` end before a stop string, while ``tokens`` include those that completed it. ``logits`` float32
    [n,V] a sequence are there on request.
    """

    tokens: list[list[int]]
    texts: list[str]
    reasons: list[str]
    stats: GenerationStats
    logits: list[Tensor] | None = None


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    stop: Sequence[str | int] = (),
    ignore_eos: bool = False,
    tokenizer: Tokenizer | None = None,
    callback: Callback | None = None,
    cache: KVCache | None = None,
    drafter: Drafter | None = None,
    return_logits: bool = False,
) -> Generation:
    """Continues one prompt or a batch of them (text or token ids, lengths may differ).

    A sequence ends at a ``stop`` string or token id, at the model's end-of-text token (unless
    ``ignore_eos``), after ``max_new_tokens``, or when the context is full. ``sampler`` None is greedy.
    ``callback(row, tokens, text)`` is called for every step of a sequence with its new tokens and the text
    they made visible. ``cache`` may hold an earlier part of the sequences; by default one of the right size
    is allocated.

    ``drafter`` guesses several tokens a step, which the model verifies in one pass over their tree. The output is that
    of plain decoding: token for token when greedy (up to the rounding of passes of another shape), in law when drawn.
    """
    sampler = sampler or Sampler.greedy()
    prompts = _token_lists(prompt, tokenizer, model.config.vocab_size)
    words = [s for s in stop if isinstance(s, str)]
    if words and tokenizer is None:
        raise ValueError(f"generate: tokenizer: expected one beside stop strings, got None (stop {words[0]!r})")
    stop_tokens = frozenset(s for s in stop if isinstance(s, int))
    if not ignore_eos:
        stop_tokens |= frozenset(model.config.eos_token_ids)
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens: expected at least 1, got {max_new_tokens}")

    held = [0] * len(prompts) if cache is None else list(cache.lengths)
    if len(held) != len(prompts):
        raise ValueError(f"generate: cache: expected one of batch size {len(prompts)}, got {len(held)}")
    rows = []
    context = model.config.context_length
    for past, ids in zip(held, prompts, strict=True):
        room = context - past - len(ids) + 1  # the last new token is not fed back
        if room < 1:
            raise ValueError(
                f"generate: prompt: expected at most {context - past} tokens (the model's context), got {len(ids)}"
            )
        rows.append(
            Row(
                limit=min(max_new_tokens, room),
                limit_reason="length" if max_new_tokens <= room else "context",
                pieces=tokenizer.stream() if tokenizer else None,
                stops=StopStrings(words),
            )
        )
    capacity = max(len(ids) + row.limit - 1 for ids, row in zip(prompts, rows, strict=True))
    if drafter is not None:
        capacity += max(0, min(drafter.max_nodes, MAX_NODES) - 1)  # nodes have a place before it is known who stays
    kv = model.new_cache(len(prompts), capacity) if cache is None else cache
    run = Run(model, kv, rows, prompts, sampler, stop_tokens, callback, return_logits)
    stats = run.stats
    with model.pinned():
        begin = time.perf_counter()
        if drafter is not None:
            drafter.begin(model, len(prompts))
        drawn = run.prefill(drafter is not None and drafter.needs_hidden)
        stats.prefill_seconds = time.perf_counter() - begin

        begin = time.perf_counter()
        first = stats.new_tokens
        if drafter is None:
            run.decode(drawn)
        else:
            run.speculate(drafter)
        stats.decode_seconds = time.perf_counter() - begin
    stats.decode_tokens = stats.new_tokens - first
    return Generation(
        tokens=[row.tokens for row in rows],
        texts=[row.text for row in rows],
        reasons=[row.reason for row in rows],
        stats=stats,
        logits=[torch.stack(row.logits) for row in rows] if return_logits else None,
    )


def _token_lists(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    items: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    if isinstance(items, str) or len(items) == 0 or isinstance(items[0], int):
        items = [items]
    lists = []
    for item in items:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("generate: tokenizer: expected one beside a text prompt, got None")
            item = tokenizer.encode(item)
        ids = [int(i) for i in item]
        if not ids:
            raise ValueError("generate: prompt: expected at least one token, got none")
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"generate: prompt: expected token ids from 0 to {vocab_size - 1}, got {wrong}")
        lists.append(ids)
    return lists
