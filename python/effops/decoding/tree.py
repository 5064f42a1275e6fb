"""The shape of a tree of drafted tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def _host() -> Any:
    try:
        from effops import _host
    except ImportError as error:
        raise RuntimeError(f"TokenTree: the host module effops._host is not available: {error}") from None
    return _host.TokenTree


class TokenTree:
    """An immutable tree of 1 to 1024 nodes. Node 0, the root, is the last emitted token, whose key a step writes.

    Args:
        parents: the parent of each node: -1 for node 0 only, an earlier node for every other.
        ranks: which of its drafter's choices each node is, different among siblings, -1 for the root; None: siblings
            count from 0.

    Raises:
        ValueError: naming what is wrong, here and in all methods.
    """

    __slots__ = ("_tree",)

    def __init__(self, parents: Sequence[int], ranks: Sequence[int] | None = None) -> None:
        self._tree = _host()(list(parents), None if ranks is None else list(ranks))

    @classmethod
    def _of(cls, tree: Any) -> TokenTree:
        made = cls.__new__(cls)
        made._tree = tree
        return made

    @classmethod
    def from_paths(cls, choices: Iterable[Sequence[int]]) -> TokenTree:
        """From paths of ranks, each with all of its prefixes; the root is implied. Nodes go by length of their path,
        then lexicographically."""
        return cls._of(_host().from_paths([list(path) for path in choices]))

    @classmethod
    def chain(cls, n: int) -> TokenTree:
        """n nodes, each the only child of the one before."""
        return cls._of(_host().chain(n))

    @classmethod
    def full(cls, widths: Sequence[int]) -> TokenTree:
        """Every node of depth d has ``widths[d]`` children."""
        return cls._of(_host().full(list(widths)))

    @classmethod
    def optimal(cls, acceptance: Sequence[Sequence[float]], step_times: Mapping[int, float]) -> TokenTree:
        """The tree that emits the most expected tokens a second.

        Args:
            acceptance: ``acceptance[d][r]``, the probability that the choice of rank r for depth ``d + 1`` is right,
                given that its parent's path is; need not fall with r.
            step_times: seconds of a step, drafting included, by the number of nodes. Linear between the sizes that
                are given; no tree is smaller than the smallest (unless the table has no more paths) or larger than
                the largest.

        For each size it holds the likeliest paths, which emit ``1 + sum of their probabilities`` tokens.
        """
        table = [list(map(float, row)) for row in acceptance]
        return cls._of(_host().optimal(table, [(int(n), float(t)) for n, t in step_times.items()]))

    @property
    def parents(self) -> tuple[int, ...]:
        return tuple(self._tree.parents)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The last rank of each node's path; -1 for the root."""
        return tuple(self._tree.ranks)

    @property
    def depths(self) -> tuple[int, ...]:
        """0 for the root."""
        return tuple(self._tree.depths)

    @property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, in order."""
        return tuple(map(tuple, self._tree.children()))

    @property
    def max_depth(self) -> int:
        return int(self._tree.max_depth())

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(self._tree.leaves())

    def __len__(self) -> int:
        return int(self._tree.size())

    def ancestors(self) -> Tensor:
        """int64 ``[T, ceil(T / 64)]``: bit ``j & 63`` of word ``j >> 6`` for each ancestor j of a node and itself."""
        return torch.tensor(self._tree.ancestors(), dtype=torch.int64).view(len(self), -1)

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The nodes from the root to each leaf, leaves in order."""
        return tuple(map(tuple, self._tree.paths()))

    def truncated(self, max_depth: int | None = None, max_nodes: int | None = None) -> TokenTree:
        """The first ``max_nodes`` nodes of those no deeper than ``max_depth``."""
        depth, nodes = (len(self) if x is None else x for x in (max_depth, max_nodes))
        return self._of(self._tree.truncated(depth, nodes))

    def expected(self, acceptance: Sequence[Sequence[float]]) -> float:
        """The tokens that a step emits if drafts are right as ``acceptance`` says (see :meth:`optimal`); ranks that
        the table lacks never are."""
        return float(self._tree.expected([list(map(float, row)) for row in acceptance]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenTree):
            return NotImplemented
        return self.parents == other.parents and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash((self.parents, self.ranks))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parents, self.ranks)

    def __repr__(self) -> str:
        plain = self.ranks == type(self)(self.parents).ranks
        return f"TokenTree({list(self.parents)}{'' if plain else f', ranks={list(self.ranks)}'})"
