"""From logits to the next token: greedy, or a draw from the filtered distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Filters in the order temperature, top-k, top-p, min-p, then a draw by inverse CDF in id order.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. top-p keeps the smallest
    descending prefix with mass of at least ``top_p``; min-p keeps what has at least ``min_p`` times the
    largest probability. Ties go to the lowest id. ``generator`` supplies the uniforms where none are given.
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

        check("temperature", self.temperature >= 0, "0 or more")
        check("top_k", self.top_k >= 0, "0 or more")
        check("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]")

    @classmethod
    def greedy(cls) -> Sampler:
        return cls(temperature=0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The law of the next token, float64 [B,V], of logits [B,V]; one-hot when greedy."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        p = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_k:
            p = _normalised(p * _largest(p, self.top_k))
        if self.top_p < 1:
            ordered, ids = p.sort(dim=-1, descending=True, stable=True)
            before = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
            p = _normalised(torch.zeros_like(p).scatter(-1, ids, ordered * (before < self.top_p)))
        if self.min_p:
            p = _normalised(p * (p >= self.min_p * p.amax(-1, keepdim=True)))
        return p

    def __call__(self, logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """Next tokens int64 [B] of logits [B,V]; ``uniforms`` [B] in [0, 1) decide the draw."""
        if self.temperature == 0:
            return logits.argmax(-1)  # torch's argmax returns the first of equal maxima
        p = self.probabilities(logits)
        if uniforms is None:
            uniforms = torch.rand(p.shape[0], dtype=torch.float64, device=p.device, generator=self.generator)
        cumulative = p.cumsum(-1)
        target = uniforms.to(p)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
        # Rounding of the target up to the total must not lead past the last possible token.
        last = p.shape[-1] - 1 - (p.flip(-1) > 0).int().argmax(-1)
        return torch.minimum(drawn, last)


def _normalised(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


def _largest(p: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` largest entries of each row; of equal ones at the edge the lowest ids."""
    if count >= p.shape[-1]:
        return torch.ones_like(p, dtype=torch.bool)
    edge = p.topk(count).values[:, -1:]
    above, tied = p > edge, p == edge
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
