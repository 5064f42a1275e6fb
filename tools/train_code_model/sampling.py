"""Which training rows a step sees, and how long they are."""

from __future__ import annotations

import numpy as np
import torch
from data import epoch_stream

# (share of the steps, sequence length): the full context is trained last, when the rest is learned.
LENGTHS = ((0.55, 256), (0.25, 512), (0.10, 1024), (0.10, 2048))


def stage_at(step: int, total_steps: int) -> tuple[int, int, int]:
    """(stage, its first step, its sequence length) at this step; the first stage while total_steps is 0."""
    first, share_done = 0, 0.0
    for stage, (share, length) in enumerate(LENGTHS):
        share_done += share
        next_first = round(total_steps * share_done)
        if step < next_first or not total_steps or stage == len(LENGTHS) - 1:
            return stage, first, length
        first = next_first
    raise AssertionError("LENGTHS is empty")


class Sampler:
    """Training rows: each pass over the text cuts it anew into rows and takes every row once, shuffled.

    A row is a function of (seed, stage, index) alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, documents: list[np.ndarray], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        self.epoch_tokens = sum(map(len, documents))
        self.cached: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def _row(self, stage: int, index: int, length: int) -> np.ndarray:
        """Row `index` of this stage, int64 [length + 1]; the last token is the next row's first."""
        rows = (self.epoch_tokens - 1) // length
        key = (stage, index // rows)
        if self.cached is None or self.cached[0] != key:
            seed = [self.seed, *key]
            order = np.random.default_rng(seed).permutation(rows)
            self.cached = (key, epoch_stream(self.documents, seed), order)
        _, stream, order = self.cached
        begin = int(order[index % rows]) * length
        return stream[begin : begin + length + 1]

    def batch(self, stage: int, first_row: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token targets, int64 [rows, length] each."""
        ids = np.stack([self._row(stage, first_row + i, length) for i in range(rows)])
        tokens = torch.from_numpy(ids)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
