"""One row of a benchmark: what is computed, by whom, at which cost, and how its results are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from effops.cache.memory import cache_memory

Call = Callable[[int], Any]  # the argument chooses one of the rotated copies of the inputs


class Missing(Exception):
    """A candidate that cannot run here; the message says why."""


def candidate(form: Callable[..., Callable[[], Any]], copies: Iterable[tuple[Any, ...]]) -> Call | str:
    """``form(*inputs)`` of each copy, prepared; or why it cannot run."""
    try:
        calls = [form(*copy) for copy in copies]
    except Missing as missing:
        return str(missing)
    return lambda i: calls[i]()


def in_cache(x: torch.Tensor) -> torch.Tensor:
    """A copy of keys or values [B,L,G,D] in memory as caches have it, heads-major."""
    by_heads = x.transpose(1, 2)
    return cache_memory(*by_heads.shape, dtype=x.dtype, device=x.device).copy_(by_heads).transpose(1, 2)


@dataclass(frozen=True)
class Other:
    """What a candidate computes instead of the case, and the fewest bytes and FLOPs of that."""

    computes: str
    bytes: int
    flops: int


@dataclass
class Work:
    """Fewest bytes and FLOPs, and the candidates by name: a call, or the reason why there is none.

    ``others`` are the candidates that compute something else for comparison; they have a floor of their own.
    ``check(name, result)`` is the worst ratio of error to bound of the result on copy 0; over 1 is wrong.
    """

    name: str
    fields: dict[str, Any]
    dtype: torch.dtype
    bytes: int
    flops: int
    copies: int
    candidates: dict[str, Call | str]
    check: Callable[[str, Any], float]
    others: dict[str, Other] = field(default_factory=dict)

    def without_operands(self) -> Work:
        """What a row keeps: calls and check hold gigabytes."""
        return replace(self, candidates={}, check=_spent)


def _spent(name: str, result: Any) -> float:
    raise RuntimeError(f"{name}: the operands of this row are gone")


@dataclass
class Result:
    """What became of one candidate: status is ok, n/a, wrong or void."""

    status: str
    reason: str = ""
    check: float | None = None
    times: list[float] = field(default_factory=list)
