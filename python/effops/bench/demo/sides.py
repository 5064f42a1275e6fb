"""The two sides of the demo under one call: a greedy continuation with its logits and times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops.bench.demo.forms import fastest
from effops.bench.demo.torch_llama import TorchLlama
from effops.decoding import generate
from effops.models import Llama

NAMES = ("torch", "effops")


@dataclass
class Run:
    """New tokens, the logits [n,V] they were chosen from, seconds of the prompt and of the steps after it."""

    tokens: list[int]
    logits: Tensor
    prefill: float
    decode: float

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


class Sides:
    """Both decoders over the same weights, and plain torch in float64 as their judge."""

    def __init__(self, model: Llama, prompt: int, new: int) -> None:
        self.model = model
        forms, self.form_times = fastest(model, prompt, prompt + new // 2)
        self.torch = TorchLlama(model, forms)
        self.exact = TorchLlama(copy.deepcopy(model).double())
        self.calls: dict[str, Callable[[Sequence[int], int], Run]] = {"torch": self._torch, "effops": self._effops}

    def run(self, side: str, prompt: Sequence[int], count: int) -> Run:
        return self.calls[side](prompt, count)

    def as_json(self) -> dict[str, Any]:
        return {"forms": vars(self.torch.forms), "form_times_us": self.form_times}

    @torch.inference_mode()
    def _torch(self, prompt: Sequence[int], count: int) -> Run:
        model, logits, chosen = self.torch, [], []
        begin = time.perf_counter()
        cache = model.new_cache(len(prompt) + count - 1)
        logits.append(model.forward(torch.tensor(prompt), cache))
        chosen.append(logits[-1].argmax(-1))
        middle = time.perf_counter()
        for _ in range(count - 1):
            logits.append(model.forward(chosen[-1], cache))
            chosen.append(logits[-1].argmax(-1))
        tokens = torch.cat(chosen).tolist()
        end = time.perf_counter()
        return Run(tokens, torch.cat(logits), middle - begin, end - middle)

    def _effops(self, prompt: Sequence[int], count: int) -> Run:
        begin = time.perf_counter()
        result = generate(self.model, [list(prompt)], max_new_tokens=count, ignore_eos=True, return_logits=True)
        end = time.perf_counter()
        assert result.logits is not None
        # All that is not the prefill counts as decoding, the work around the steps included.
        prefill = result.stats.prefill_seconds
        return Run(result.tokens[0], result.logits[0], prefill, end - begin - prefill)
