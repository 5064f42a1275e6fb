"""What a decoder needs of a KV cache, whatever its memory looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(slots=True)
class Step:
    """One forward pass over a cache: where its T new tokens of each sequence stand.

    Shorter rows are padded on the left. ``positions`` int32 [B,T] feed the rotary embedding (0 for
    padding), ``slots`` int32 [B,T] are where keys are written (-1 for padding), ``kv_lens`` int32 [B] count
    the keys after the step and ``lengths`` say the same on the host. ``max_kv_len`` is their maximum.
    """

    positions: Tensor
    slots: Tensor
    kv_lens: Tensor
    lengths: list[int]
    max_kv_len: int


class LayerCache(Protocol):
    """The keys and values of one layer."""

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Writes k [B,T,G,D], v [B,T,G,Dv] at the step's slots."""

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Turns the query and key heads of qkv [B,T,H+2G,D] by the rows ``step.positions`` of cos and sin, writes keys
        and values at the step's slots and returns the queries [B,T,H,D]."""

    def attend(self, q: Tensor, step: Step, **options: Any) -> Tensor:
        """Attention of q [B,T,H,D] over the first ``step.kv_lens`` keys; options as in ``ops.attention``."""


class KVCache(Protocol):
    """All layers of a model for a batch of sequences.

    A forward pass calls ``plan``, appends and attends in every layer, then ``advance``. A pass that fails in
    between leaves the lengths as they were.
    """

    lengths: list[int]

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def plan(self, tokens: int, lengths: Sequence[int] | None = None) -> Step:
        """The step of ``tokens`` new tokens a sequence, or of ``lengths[b] <= tokens`` padded on the left."""

    def advance(self, step: Step) -> None:
        """Makes the step's tokens part of the cache."""

    def reset(self) -> None:
        """Forgets every sequence; the memory stays."""
