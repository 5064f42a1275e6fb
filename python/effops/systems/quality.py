"""What a KV cache costs in quality: the loss of a held-out continuation, and recall of what stands far back.

Both teach the true tokens one by one through the cache under test, so that every scored prediction reads it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from effops.cache import DenseKVCache, KVCache
from effops.models import Llama
from effops.systems.texts import Recall

NewCache = Callable[[int, int], KVCache]
"""From a batch size and a capacity to an empty cache."""


@dataclass
class Measured:
    """``losses``: nats a token of each text; ``seconds``: of each decode step; ``nbytes``: the cache's memory."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    nbytes: int = 0

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def step_ms(self) -> float:
        return median(self.seconds) * 1e3

    def above(self, other: Measured) -> tuple[float, float]:
        """How much larger the loss is than the other's of the same texts: the mean difference and its standard error
        over texts (NaN of one text)."""
        differences = [a - b for a, b in zip(self.losses, other.losses, strict=True)]
        mean = sum(differences) / len(differences)
        if len(differences) < 2:
            return mean, math.nan
        variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
        return mean, math.sqrt(variance / len(differences))


def copy_prompt(source: DenseKVCache, target: KVCache) -> None:
    """Writes what an empty cache would hold after the source's sequences, all of one length. Right for caches whose
    prompts see every key: a pass of the model over the same tokens writes the same."""
    (length,) = set(source.lengths)
    step = target.plan(length)
    for kept, layer in zip(source.layers, target.layers, strict=True):
        layer.append(kept.k[:, :length], kept.v[:, :length], step)
    target.advance(step)


@torch.inference_mode()
def continuation_losses(
    model: Llama,
    caches: Mapping[str, NewCache],
    texts: Tensor,
    prompt: int,
    *,
    batch: int = 8,
    own_prompt: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Measured]:
    """The mean loss of ``texts[:, prompt + 1:]``, each token predicted by a decode step over each cache.

    Args:
        caches: by name; every one holds the same prompt and is taught the same tokens.
        texts: int64 ``[N, T]``; prompt: so many first tokens are there at the start, ``1 <= prompt <= T - 2``.
        own_prompt: each cache goes through the prompt itself, for those that do not see or keep all of it; otherwise
            one dense pass serves all.
        progress: is told a cache's name, steps done and steps in all.

    Raises:
        ValueError: no text, or no token to score.
    """
    count, length = texts.shape
    if count == 0 or not 1 <= prompt <= length - 2:
        raise ValueError(
            f"continuation_losses: texts: expected one or more of prompt + 2 = {prompt + 2} tokens at least, got "
            f"{count} of {length}"
        )
    found = {name: Measured() for name in caches}
    steps = length - 1 - prompt
    total, done = -(-count // batch) * len(caches) * steps, 0
    for rows in texts.split(batch):
        dense = None
        if not own_prompt:
            dense = model.new_cache(len(rows), prompt)
            model.hidden_states(rows[:, :prompt], dense, keep=1)
        for name, new_cache in caches.items():
            progress(name, done, total)
            cache = new_cache(len(rows), length)
            if dense is None:
                model.hidden_states(rows[:, :prompt], cache, keep=1)
            else:
                copy_prompt(dense, cache)
            losses = torch.zeros(len(rows), dtype=torch.float64)
            for logits, target, seconds in _steps(model, cache, rows, prompt):
                losses -= logits.log_softmax(-1).gather(1, target[:, None])[:, 0].double().cpu()
                found[name].seconds.append(seconds)
                done += 1
                progress(name, done, total)
            found[name].losses += (losses / steps).tolist()
            found[name].nbytes = max(found[name].nbytes, cache.nbytes)
    return found


@torch.inference_mode()
def recall_accuracy(model: Llama, new_cache: NewCache, task: Recall, *, batch: int = 8) -> float:
    """The share of samples whose every answer token is the likeliest, given the true ones before it."""
    length = task.prompts.shape[1]
    right = 0
    for prompts, answers in zip(task.prompts.split(batch), task.answers.split(batch), strict=True):
        rows = torch.cat([prompts, answers], 1)
        cache = new_cache(len(rows), rows.shape[1])
        model.hidden_states(prompts[:, :-1], cache, keep=1)
        hits = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for logits, target, _ in _steps(model, cache, rows, length - 1):
            hits &= logits.argmax(-1) == target
        right += int(hits.sum())
    return right / len(task.prompts)


def _steps(model: Llama, cache: KVCache, rows: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(logits float32 [B,V], the true next token [B], seconds) of a decode step on each token from ``start`` on."""
    with model.pinned():
        for i in range(start, rows.shape[1] - 1):
            begin = time.perf_counter()
            logits = model.forward(rows[:, i : i + 1], cache)[:, 0]
            yield logits.float(), rows[:, i + 1], time.perf_counter() - begin
