"""The generation loop, sampling, drafters and their trees, and the judgement on whether two runs agree."""

from __future__ import annotations

from effops.decoding.copying import CopyDrafter, SuffixMatcher
from effops.decoding.draft import Draft, DraftContext, Drafter
from effops.decoding.generate import Generation, generate
from effops.decoding.identical import Verdict, compare, exact_logits
from effops.decoding.medusa import MedusaHeads, medusa_loss
from effops.decoding.medusa_drafter import MedusaDrafter
from effops.decoding.merged import MergedDrafter
from effops.decoding.model_drafter import ModelDrafter
from effops.decoding.sampler import Sampler
from effops.decoding.stats import GenerationStats
from effops.decoding.step_times import step_times
from effops.decoding.stop import StopStrings
from effops.decoding.tree import TokenTree

__all__ = [
    "CopyDrafter",
    "Draft",
    "DraftContext",
    "Drafter",
    "Generation",
    "GenerationStats",
    "MedusaDrafter",
    "MedusaHeads",
    "MergedDrafter",
    "ModelDrafter",
    "Sampler",
    "StopStrings",
    "SuffixMatcher",
    "TokenTree",
    "Verdict",
    "compare",
    "exact_logits",
    "generate",
    "medusa_loss",
    "step_times",
]
