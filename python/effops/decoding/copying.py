"""Drafts copied from what the sequence already holds (CopySpec, arXiv 2502.08923; prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from effops.decoding.draft import Draft, DraftContext, Drafter

Policy = Literal["first", "last", "longest"]


class SuffixMatcher:
    """Where the last ``gamma`` tokens of a growing sequence occurred before.

    Every gamma-gram that ends before the last token is kept in a hash table by its tokens, so that a hit is an exact
    match. ``policy`` chooses among several: the first one, the last one, or the one that most tokens before agree with
    (among the last ``CANDIDATES``; of equals the last).
    """

    CANDIDATES = 32

    def __init__(self, gamma: int = 3, policy: Policy = "longest") -> None:
        if gamma < 1:
            raise ValueError(f"SuffixMatcher: gamma: expected at least 1, got {gamma}")
        if policy not in ("first", "last", "longest"):
            raise ValueError(f"SuffixMatcher: policy: expected 'first', 'last' or 'longest', got {policy!r}")
        self.gamma, self.policy = gamma, policy
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where what follows a gram begins
        self._indexed = gamma  # grams that end before this place are in the table

    def match(self, tokens: Sequence[int]) -> int | None:
        """Where the continuation of an earlier occurrence begins. ``tokens`` extend those of the call before."""
        gamma = self.gamma
        for end in range(self._indexed, len(tokens)):
            self._ends.setdefault(tuple(tokens[end - gamma : end]), []).append(end)
        self._indexed = max(self._indexed, len(tokens))
        places = self._ends.get(tuple(tokens[-gamma:])) if len(tokens) >= gamma else None
        if not places:
            return None
        if self.policy == "first":
            return places[0]
        if self.policy == "last" or len(places) == 1:
            return places[-1]
        return max(places[-self.CANDIDATES :], key=lambda place: (self._agreement(tokens, place), place))

    def _agreement(self, tokens: Sequence[int], place: int) -> int:
        """Tokens before the gram at ``place`` that are those before the last gram."""
        count, limit = self.gamma, min(place, 64)
        while count < limit and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count


class CopyDrafter(Drafter):
    """Drafts the ``block`` tokens that followed an earlier occurrence of the last ``gamma``.

    A sequence's block shrinks to what its last copies were right by, and doubles, up to ``block``, while they are right
    to the end: a wrong copy costs the time of verifying it. ``adapt=False`` always copies whole blocks.
    """

    def __init__(self, gamma: int = 3, block: int = 15, policy: Policy = "longest", *, adapt: bool = True) -> None:
        if block < 0:
            raise ValueError(f"CopyDrafter: block: expected 0 or more, got {block}")
        SuffixMatcher(gamma, policy)  # refuses what it does not take
        self.gamma, self.block, self.policy, self.adapt = gamma, block, policy, adapt
        self.max_nodes = block + 1

    def begin(self, model: object, batch_size: int) -> None:
        self._matchers = [SuffixMatcher(self.gamma, self.policy) for _ in range(batch_size)]
        self._blocks = [self.block] * batch_size
        self._last: list[tuple[int, list[int]] | None] = [None] * batch_size

    def propose(self, context: DraftContext) -> list[Draft | None]:
        return [self._copy(row, *known) for row, known in enumerate(zip(context.tokens, context.budgets, strict=True))]

    def _copy(self, row: int, tokens: list[int], budget: int) -> Draft | None:
        if budget < 1:
            return None
        self._learn(row, tokens)
        place = self._matchers[row].match(tokens)
        copied = [] if place is None else tokens[place : place + min(self._blocks[row], budget)]
        self._last[row] = (len(tokens), copied) if copied else None
        return Draft(copied) if copied else None

    def _learn(self, row: int, tokens: list[int]) -> None:
        last = self._last[row]
        if last is None or not self.adapt:
            return
        start, copied = last
        right = 0
        while right < min(len(copied), len(tokens) - start) and tokens[start + right] == copied[right]:
            right += 1
        whole = right == len(copied)
        self._blocks[row] = min(self.block, max(3, 2 * len(copied) if whole else right + 1))
