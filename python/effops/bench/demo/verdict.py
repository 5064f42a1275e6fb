"""Whether both sides say the same: the verdict in float32, divergence and logit errors in shorter types."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effops.bench.demo.sides import Run
from effops.decoding import Verdict, compare, exact_logits

# In a bfloat16 layer about a dozen results are rounded one after the other (norms, projections, rotation, scores,
# weights, sums); the errors are independent, so that they add up like a random walk.
ROUNDINGS_A_LAYER = 12
WORSE_THAN_TORCH = 1.5  # our rounding error against plain torch's


@dataclass
class Errors:
    """Root mean square of the logits and of each side's distance from exact ones."""

    logits: float
    torch: float
    effops: float

    @classmethod
    def of(cls, exact: Tensor, torch_logits: Tensor, effops_logits: Tensor) -> Errors:
        return cls(_rms(exact), _rms(torch_logits.to(exact) - exact), _rms(effops_logits.to(exact) - exact))

    @classmethod
    def typical(cls, exact: Tensor, torch_logits: Tensor, effops_logits: Tensor) -> Errors:
        """Of the median position: few positions that are far off do not count."""
        return cls(*(
            float(x.to(exact).square().mean(-1).median().sqrt())
            for x in (exact, torch_logits.to(exact) - exact, effops_logits.to(exact) - exact)
        ))  # fmt: skip

    @classmethod
    def together(cls, parts: Sequence[Errors]) -> Errors:
        def mean(name: str) -> float:
            return math.sqrt(sum(getattr(p, name) ** 2 for p in parts) / len(parts))

        return cls(mean("logits"), mean("torch"), mean("effops"))

    def fits(self, layers: int, eps: float) -> bool:
        """Both within the rounding (``eps``) of ``layers`` layers, and ours at most half worse than torch's."""
        bound = eps * math.sqrt(ROUNDINGS_A_LAYER * layers) * self.logits
        return self.torch <= bound and self.effops <= bound and self.as_good_as_torch()

    def as_good_as_torch(self) -> bool:
        return self.effops <= WORSE_THAN_TORCH * self.torch


@dataclass
class Judgement:
    """``kind`` is 'identical', 'near-tie' or 'NO' in float32, else 'same' or 'diverges'.

    ``position`` is the first different new token, ``judged`` the count of tokens up to there. ``verdict`` (float32)
    or ``errors`` hold the figures behind it.
    """

    kind: str
    position: int | None
    judged: int
    verdict: Verdict | None = None
    errors: Errors | None = None

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def judge(
    exact: Callable[[Tensor], Tensor], prompt: Sequence[int], a: Run, b: Run,
    errors_of: Callable[[Tensor, Tensor, Tensor], Errors] = Errors.of,
) -> Judgement:  # fmt: skip
    """The judgement on a peer's run and one of effops; ``exact`` gives logits [B,T,V] of ids [B,T] in float64."""
    position = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), None)
    judged = len(a.tokens) if position is None else position + 1
    if a.logits.dtype is torch.float32:
        verdict = compare(prompt, a.tokens, a.logits, b.tokens, b.logits, exact)
        return Judgement(verdict.kind, position, judged, verdict=verdict)
    right = exact_logits(exact, prompt, a.tokens[:judged])
    errors = errors_of(right, a.logits[:judged], b.logits[:judged])
    return Judgement("same" if position is None else "diverges", position, judged, errors=errors)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
