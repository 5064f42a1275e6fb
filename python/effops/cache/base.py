"""What a decoder needs of a KV cache, whatever its memory looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(slots=True)
class TreeNodes:
    """The new tokens of one step as trees: T nodes a sequence, its root first.

    ``ancestors`` int64 [B or 1, T, ceil(T/64)] and ``depths`` int32 [B or 1, T] as in ``ops.tree_attention``;
    ``max_depth`` is the largest depth. Sequences that are not ``present`` (None: all are) take no part in the step.
    """

    ancestors: Tensor
    depths: Tensor
    max_depth: int
    present: Sequence[bool] | None = None


@dataclass(slots=True)
class Step:
    """One forward pass over a cache: where its T new tokens of each sequence stand.

    Shorter rows are padded on the left. ``positions`` int32 [B,T] feed the rotary embedding (0 for padding), ``slots``
    int32 [B,T] are where keys are written (-1 for padding), ``kv_lens`` int32 [B] count the keys after the step and
    ``lengths`` say the same on the host; ``max_kv_len`` is their maximum and ``span`` one more than the last position
    of a new token. A step over trees has their masks, one over pages a table int32 [B, entries].
    """

    positions: Tensor
    slots: Tensor
    kv_lens: Tensor
    lengths: list[int]
    max_kv_len: int
    span: int
    tree: TreeNodes | None = None
    page_table: Tensor | None = None


class AcceptedNodes(Protocol):
    """What verification returns: ``nodes`` int32 [B,T], ascending, -1 after the last; ``count`` int32 [B]."""

    @property
    def nodes(self) -> Tensor: ...

    @property
    def count(self) -> Tensor: ...


class LayerCache(Protocol):
    """The keys and values of one layer."""

    @property
    def needs_queries(self) -> bool:
        """Whether ``attend`` must see the queries of all of a step's tokens, though few outputs are wanted."""
        ...

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Writes k [B,T,G,D], v [B,T,G,Dv] at the step's slots."""

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        """Turns the query and key heads of qkv [B,T,H+2G,D] by the rows ``step.positions`` of cos and sin, writes keys
        and values at the step's slots and returns the queries [B,T,H,D]."""

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        """Attention of q [B,T,H,D] over the first ``step.kv_lens`` keys, under the tree masks of a step over trees;
        options as in ``ops.attention``."""


class KVCache(Protocol):
    """All layers of a model for a batch of sequences.

    A forward pass calls ``plan``, appends and attends in every layer, then ``advance``. A pass that fails in
    between leaves the lengths as they were. After a pass over trees the lengths are still those before it, until
    ``commit`` says which nodes stay.
    """

    lengths: list[int]

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        ...

    @property
    def nbytes(self) -> int: ...

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> Step:
        """The step of ``tokens`` new tokens a sequence, of ``lengths[b] <= tokens`` padded on the left, or of trees."""

    def advance(self, step: Step) -> None:
        """Makes the step's tokens part of the cache; those of trees wait for ``commit``."""

    def commit(self, accepted: AcceptedNodes) -> None:
        """Keeps exactly the accepted nodes of the last step, which was one over trees."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens of sequence b from ``lengths[b]`` on."""

    def reorder(self, rows: Sequence[int]) -> None:
        """Sequence b becomes what sequence ``rows[b]`` was."""

    def reset(self) -> None:
        """Forgets every sequence; the memory stays."""
