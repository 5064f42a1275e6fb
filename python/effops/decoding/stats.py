"""What a generation did and how long it took."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """Counts and times of one ``generate`` call.

    The prefill reads the prompts and yields each sequence's first token; ``steps`` counts the forward passes
    after it, ``sequence_steps`` adds up over the sequences that were still running, and ``decode_tokens`` are
    the tokens that those passes yielded. With a drafter, ``draft_nodes`` counts the drafted tokens that were verified,
    ``draft_seconds``, a part of ``decode_seconds``, the time of drafting, and ``accepted_lengths`` how often a sequence
    gained how many tokens in a step.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    sequence_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    draft_nodes: int = 0
    draft_seconds: float = 0.0
    accepted_lengths: collections.Counter[int] = field(default_factory=collections.Counter)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a sequence gains in a step, its own next token included: 1 without speculation."""
        return self.decode_tokens / self.sequence_steps if self.sequence_steps else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time, prefill included."""
        total = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / total if total else 0.0
