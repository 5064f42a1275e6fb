"""The generation loop, sampling, Medusa heads, and the judgement on whether two runs agree."""

from __future__ import annotations

from effops.decoding.generate import Generation, generate
from effops.decoding.identical import Verdict, compare, exact_logits
from effops.decoding.medusa import MedusaHeads, medusa_loss
from effops.decoding.sampler import Sampler
from effops.decoding.stats import GenerationStats
from effops.decoding.stop import StopStrings

__all__ = [
    "Generation",
    "GenerationStats",
    "MedusaHeads",
    "Sampler",
    "StopStrings",
    "Verdict",
    "compare",
    "exact_logits",
    "generate",
    "medusa_loss",
]
