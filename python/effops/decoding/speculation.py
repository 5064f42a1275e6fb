"""A speculative step: drafts of a batch as one tree step, and which of their tokens the target model accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache import TreeNodes
from effops.decoding.draft import Draft
from effops.decoding.sampler import Sampler
from effops.decoding.tree import TokenTree
from effops.ops import Accepted

MAX_NODES = 1024  # of a TokenTree


@dataclass(slots=True)
class Shape:
    """A tree's parents, and what a step needs of them; tensors have one row."""

    parents: list[int]
    tensor: Tensor
    ancestors: Tensor
    depths: Tensor
    max_depth: int

    @classmethod
    def of(cls, parents: list[int]) -> Shape:
        tensor = torch.tensor([parents], dtype=torch.int32)
        ancestors, depths = ops.pack_ancestors(tensor)
        return cls(parents, tensor, ancestors, depths, int(depths.max()))


@dataclass(slots=True)
class Proposal:
    """A usable draft: the tokens of its nodes, the root's first, and its tree."""

    tokens: list[int]
    shape: Shape
    probs: Tensor | None = None
    siblings: str = "iid"


@dataclass(slots=True)
class TreeBatch:
    """All proposals of a step side by side; shorter ones are padded, absent sequences are padding alone."""

    proposals: list[Proposal | None]
    tokens: Tensor  # int64 [B, T]
    parents: Tensor  # int32 [B or 1, T]
    nodes: TreeNodes


class Speculator:
    """Turns drafts into steps. Shapes that come again are prepared once."""

    def __init__(self, vocab_size: int, max_nodes: int) -> None:
        self._vocab_size, self._max_nodes = vocab_size, min(max_nodes, MAX_NODES)
        self._chains: dict[int, Shape] = {}
        self._trees: dict[int, tuple[TokenTree, Shape]] = {}  # by identity; the tree is kept, so that its id stays

    def proposal(self, draft: Draft | None, root: int, budget: int, room: int) -> Proposal:
        """The draft cut down to what can be verified: nodes with a token, at depths up to ``budget``, ``room`` of them
        with the root."""
        room = min(room, self._max_nodes)
        if draft is None or budget < 1 or room < 2:
            return Proposal([root], self.chain(1))
        tokens = [int(t) for t in draft.tokens[: room - 1]]
        if draft.tree is None:
            tokens = tokens[:budget]
            if not self._all_tokens(tokens):
                tokens = tokens[: next(i for i, t in enumerate(tokens) if not 0 <= t < self._vocab_size)]
            shape, kept = self.chain(len(tokens) + 1), None
        else:
            shape = self._shape(draft.tree)
            kept = self._usable(tokens, shape, budget)
            if kept is not None:
                number = {-1: -1} | {old: new for new, old in enumerate(kept)}
                shape = Shape.of([number[shape.parents[i]] for i in kept])
                tokens = [tokens[i - 1] for i in kept[1:]]
        probs = draft.probs
        if probs is not None:
            rows = slice(0, len(tokens)) if kept is None else [i - 1 for i in kept[1:]]
            probs = self._law(probs, rows, tokens)
        return Proposal([root, *tokens], shape, probs, draft.siblings)

    def _all_tokens(self, tokens: list[int]) -> bool:
        return not tokens or (min(tokens) >= 0 and max(tokens) < self._vocab_size)

    def chain(self, n: int) -> Shape:
        """The chain of n nodes."""
        if n not in self._chains:
            self._chains[n] = Shape.of(list(range(-1, n - 1)))
        return self._chains[n]

    def _shape(self, tree: TokenTree) -> Shape:
        known = self._trees.get(id(tree))
        if known is None:
            if len(self._trees) > 256:  # drafters that make a tree a step
                self._trees.clear()
            known = self._trees[id(tree)] = (tree, Shape.of(list(tree.parents)))
        return known[1]

    def _usable(self, tokens: list[int], shape: Shape, budget: int) -> list[int] | None:
        """The nodes that stay; None: all of them."""
        whole = len(tokens) == len(shape.parents) - 1 and shape.max_depth <= budget
        if whole and self._all_tokens(tokens):
            return None
        depths, kept = shape.depths[0].tolist(), [0]
        inside = {0}
        for i, token in enumerate(tokens[: len(shape.parents) - 1], 1):
            if shape.parents[i] in inside and depths[i] <= budget and 0 <= token < self._vocab_size:
                inside.add(i)
                kept.append(i)
        return kept

    def _law(self, probs: Tensor, rows: Any, tokens: list[int]) -> Tensor | None:
        """The rows of the law, or None if they are none: tokens then count as chosen without chance, which is right
        however they were found."""
        if probs.dim() != 2 or probs.shape[1] != self._vocab_size:
            return None
        if probs.shape[0] < (len(tokens) if isinstance(rows, slice) else max(rows, default=-1) + 1):
            return None
        law = probs[rows].float()
        own = law.gather(1, torch.tensor(tokens, dtype=torch.int64).view(-1, 1))
        good = bool((law >= 0).all() and (own > 0).all()) and bool(((law.sum(1) - 1).abs() < 1e-3).all())
        return law if good else None

    def batch(self, proposals: list[Proposal | None]) -> TreeBatch | None:
        """The step of these proposals; None if no sequence has more than its root."""
        present = [p for p in proposals if p is not None]
        width = max((len(p.tokens) for p in present), default=0)
        if width < 2:
            return None
        rows = [[0] * width if p is None else p.tokens + [0] * (width - len(p.tokens)) for p in proposals]
        tokens = torch.tensor(rows, dtype=torch.int64)
        shape = present[0].shape
        if len(present) == len(proposals) and all(p.shape is shape for p in present):
            return TreeBatch(proposals, tokens, shape.tensor, TreeNodes(shape.ancestors, shape.depths, shape.max_depth))
        own = [[] if p is None else p.shape.parents for p in proposals]
        parents = torch.tensor([row + [-2] * (width - len(row)) for row in own], dtype=torch.int32)
        ancestors, depths = ops.pack_ancestors(parents)
        there = None if len(present) == len(proposals) else [p is not None for p in proposals]
        nodes = TreeNodes(ancestors, depths, max(p.shape.max_depth for p in present), there)
        return TreeBatch(proposals, tokens, parents, nodes)


def verify(batch: TreeBatch, logits: Tensor, sampler: Sampler) -> Accepted:
    """The accepted nodes and the next token of each sequence, from logits [B,T,V] of all nodes. Lossless: greedy output
    is plain decoding's, sampled output has its law."""
    if sampler.temperature == 0:
        plain = type(sampler) is Sampler and not logits.requires_grad
        return ops.verify_greedy(batch.parents, batch.tokens, logits if plain else sampler(logits))
    laws = sampler.probabilities(logits)
    laws = laws.float()
    uniforms = torch.rand(*batch.tokens.shape[:1], batch.tokens.shape[1] + 1, dtype=torch.float64,
                          generator=sampler.generator)  # fmt: skip
    kinds = [None if p is None else "deterministic" if p.probs is None else p.siblings for p in batch.proposals]
    used = sorted({kind for kind in kinds if kind is not None})
    if len(used) == 1 and None not in kinds:
        return _verify_kind(used[0], batch, batch.parents, laws, uniforms)
    result: Accepted | None = None
    for kind in used:  # sequences of another kind are absent from the call
        own = torch.tensor([k == kind for k in kinds])
        parents = batch.parents.expand(len(kinds), -1).masked_fill(~own[:, None], -2)
        part = _verify_kind(kind, batch, parents, laws, uniforms)
        result = part if result is None else Accepted(*(
            torch.where(own.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(part, result, strict=True)
        ))  # fmt: skip
    assert result is not None
    return result


def _verify_kind(kind: Any, batch: TreeBatch, parents: Tensor, laws: Tensor, uniforms: Tensor) -> Accepted:
    drafted = None
    if kind != "deterministic":
        drafted = torch.zeros_like(laws)
        for row, proposal in enumerate(batch.proposals):
            if proposal is not None and proposal.probs is not None and proposal.siblings == kind:
                drafted[row, 1 : len(proposal.tokens)] = proposal.probs
    return ops.verify_rejection(parents, batch.tokens, drafted, laws, uniforms, siblings=kind)


def room_of(lengths: Sequence[int], capacity: int, running: Sequence[bool]) -> int:
    """Nodes that every running sequence has room for."""
    return min((capacity - n for n, runs in zip(lengths, running, strict=True) if runs), default=math.inf)  # type: ignore[return-value]
