"""From logits to the next token: greedy, or a draw from the filtered distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops import ops, reference


@dataclass
class Sampler:
    """Filters in the order temperature, top-k, top-p, min-p, then a draw by inverse CDF in id order.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. top-p keeps the smallest
    descending prefix with mass of at least ``top_p``; min-p keeps what has at least ``min_p`` times the
    largest probability. Ties go to the lowest id. ``generator`` supplies the uniforms where none are given.

    Runs the ops ``sampling_probs`` and ``sample``, and their references on devices that the ops do not know.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ValueError(f"Sampler: {name}: expected {expected}, got {getattr(self, name)}")

        check("temperature", 0 <= self.temperature < float("inf"), "a finite number of 0 or more")
        check("top_k", self.top_k >= 0, "0 or more")
        check("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]")

    @classmethod
    def greedy(cls) -> Sampler:
        return cls(temperature=0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The law of the next token, float32 [B,V] (float64 for float64), of logits [B,V]; one-hot when greedy."""
        source = ops if logits.device.type == "cpu" else reference
        return source.sampling_probs(logits.detach(), **self._filters())

    def __call__(self, logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Next tokens int64 [B] of logits [B,V]; ``uniforms`` [B] in [0, 1) decide the draw."""
        if logits.requires_grad:
            logits = logits.detach()
        source = ops if logits.device.type == "cpu" else reference
        if uniforms is None:
            if self.temperature == 0:  # a greedy sampler leaves the generator as it is
                return source.sample(logits, temperature=0.0)
            uniforms = torch.empty(logits.shape[:-1], dtype=torch.float64, device=logits.device)
            uniforms.uniform_(generator=self.generator)
        return source.sample(logits, uniforms.double(), **self._filters())

    def _filters(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
