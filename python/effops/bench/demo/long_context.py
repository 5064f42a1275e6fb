"""The second part of the demo: bfloat16 decode steps at long contexts, on random weights and a random cache.

Weights and cache are random because only their sizes matter to the time; a prompt of 4096 tokens would take most of
the demo. Keys are drawn wide enough that attention picks a few of them, so that a wrong key would show in the logits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from effops.bench.demo.forms import fastest
from effops.bench.demo.sides import NAMES
from effops.bench.demo.torch_llama import Cache, TorchLlama
from effops.bench.demo.verdict import Errors
from effops.cache import DenseKVCache
from effops.models import Llama, ModelConfig

CONTEXTS = (512, 1024, 2048, 4096)
KEY_DEVIATION = 4.0
TOKEN = 17  # any: the embedding is random


@dataclass
class Point:
    """The steps at one context: seconds of each, the logits' errors against float32, plain torch's form."""

    context: int
    seconds: dict[str, list[float]]
    errors: Errors
    forms: dict[str, str]

    def median(self, side: str) -> float:
        return median(self.seconds[side])

    @property
    def speedup(self) -> float:
        return self.median("torch") / self.median("effops")

    def quartiles(self, side: str) -> tuple[float, float]:
        first, _, third = quantiles(self.seconds[side], n=4)
        return first, third

    def as_json(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "speedup": self.speedup,
            **{side: {"median_ms": self.median(side) * 1e3, "seconds": self.seconds[side]} for side in NAMES},
            "relative_logit_error": {side: getattr(self.errors, side) / self.errors.logits for side in NAMES},
            "forms": self.forms,
        }


@torch.inference_mode()
def measure(
    config: ModelConfig, contexts: Iterable[int], steps: int, progress: Callable[[str], None]
) -> Iterable[Point]:
    """One point a context, the sides taking turns, after both were checked on the same cache."""
    contexts, dtype = list(contexts), torch.bfloat16
    progress("drawing random weights")
    model = Llama.random(config, dtype=dtype)
    forms = {n: fastest(model, 0, n)[0] for n in contexts}
    plain = TorchLlama(model)
    theirs, ours = plain.new_cache(max(contexts)), model.new_cache(1, max(contexts))
    fill(theirs, ours)
    token = torch.tensor([TOKEN])

    def torch_step(context: int) -> Tensor:
        theirs.length = context - 1
        return plain.forward(token, theirs)

    def effops_step(context: int) -> Tensor:
        return model.forward(token[None], ours)[0]

    errors = {}
    truth = TorchLlama(copy.deepcopy(model).float())
    wide = Cache([k.float() for k in theirs.k], [v.float() for v in theirs.v])
    for context in contexts:
        progress(f"context {context}: checking the logits against float32")
        plain.forms = forms[context]
        rewind(ours, context)
        wide.length = context - 1
        errors[context] = Errors.of(truth.forward(token, wide), torch_step(context), effops_step(context))
    del truth, wide

    for context in contexts:
        plain.forms = forms[context]
        seconds: dict[str, list[float]] = {side: [] for side in NAMES}
        for i in range(steps + 1):
            progress(f"context {context}: step {i} of {steps}")
            for side in NAMES if i % 2 == 0 else reversed(NAMES):
                rewind(ours, context)
                begin = time.perf_counter()
                (torch_step if side == "torch" else effops_step)(context).argmax(-1).tolist()
                seconds[side].append(time.perf_counter() - begin)
        yield Point(context, {side: s[1:] for side, s in seconds.items()}, errors[context], vars(plain.forms))


def fill(theirs: Cache, ours: DenseKVCache) -> None:
    """The same random keys and values in both caches."""
    generator = torch.Generator().manual_seed(1)
    for k, v, layer in zip(theirs.k, theirs.v, ours.layers, strict=True):
        k.normal_(0, KEY_DEVIATION, generator=generator)
        v.normal_(0, 1, generator=generator)
        layer.k[0].copy_(k.transpose(0, 1))
        layer.v[0].copy_(v.transpose(0, 1))


def rewind(cache: DenseKVCache, context: int) -> None:
    """Makes the next token the last of ``context``."""
    cache.reset()
    cache.advance(cache.plan(context - 1))
