"""The generation loop, sampling, trees of drafts, and the judgement on whether two runs agree."""

from __future__ import annotations

from effops.decoding.generate import Generation, generate
from effops.decoding.identical import Verdict, compare, exact_logits
from effops.decoding.sampler import Sampler
from effops.decoding.stats import GenerationStats
from effops.decoding.stop import StopStrings
from effops.decoding.tree import TokenTree

__all__ = [
    "Generation",
    "GenerationStats",
    "Sampler",
    "StopStrings",
    "TokenTree",
    "Verdict",
    "compare",
    "exact_logits",
    "generate",
]
