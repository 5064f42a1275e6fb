"""Which entries of a KV head stay when there are more than its cache may keep."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

Pooling = Literal["avg", "max"]


def _ranks(weights: Tensor, positions: Tensor, recent: int, num_sinks: int) -> Tensor:
    """The weights, infinite where an entry stays whatever its weight."""
    stays = (positions < num_sinks) | (positions > positions.amax(-1, keepdim=True) - recent)
    largest = torch.finfo(weights.dtype).max
    return weights.nan_to_num(nan=largest, posinf=largest).masked_fill(stays, torch.inf)


def _in_order(chosen: Tensor, positions: Tensor) -> Tensor:
    return chosen.gather(-1, positions.gather(-1, chosen).argsort(-1))


def heaviest_entries(mass: Tensor, positions: Tensor, count: int, recent: int, num_sinks: int) -> Tensor:
    """int64 [G,count], ascending by position: of entries with mass [G,n] and positions int32 [G,n] the ``recent``
    newest, those of positions below ``num_sinks`` and the heaviest others, of equals the newest."""
    by_age = positions.argsort(-1, descending=True)
    ranks = _ranks(mass, positions, recent, num_sinks).gather(-1, by_age)
    order = by_age.gather(-1, ranks.argsort(dim=-1, descending=True, stable=True))
    return _in_order(order[..., :count], positions)


def observed_entries(scores: Tensor, positions: Tensor, count: int, recent: int, num_sinks: int) -> Tensor:
    """The same by scores [G,n] of entries in the order of their positions, of equals the oldest."""
    order = _ranks(scores, positions, recent, num_sinks).argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(-1).values


def pooled(scores: Tensor, pooling: Pooling, kernel_size: int) -> Tensor:
    """[G,n] of scores [G,n]: each with its neighbours, ``kernel_size`` in all, beyond the ends zeros for an average
    and nothing for a maximum."""
    pool = avg_pool1d if pooling == "avg" else max_pool1d
    return pool(scores[None], kernel_size, 1, kernel_size // 2)[0]
