"""Token trees, and which drafted nodes of them stay.

The rules work on lists of any kind of number: floats, or fractions, with which the law of a result is enumerated
exactly. They ask a ``chance`` for every random decision. A tree is a list of parents: -1 the root (node 0), -2
padding, parents before children. Target laws ``target[i]`` follow node i; ``draft[i]`` is the law that node i was
drawn from. Laws need not be normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Path = tuple[list[int], int]  # accepted nodes, root first, and the next token


class Chance(Protocol):
    """Who decides: uniforms, or an enumeration of all that may happen."""

    def accepts(self, node: int, probability: Any) -> bool: ...
    def draws(self, place: int, law: Sequence[Any]) -> int: ...


class Uniforms:
    """Decisions from numbers in [0, 1): ``values[i]`` is that of node i, the last one the final draw."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def accepts(self, node: int, probability: Any) -> bool:
        return bool(self.values[node] < probability)

    def draws(self, place: int, law: Sequence[Any]) -> int:
        """Inverse CDF in id order; rounding does not lead past the last possible token."""
        reached: Any = 0
        for token, p in enumerate(law):
            reached += p
            if self.values[place] < reached:
                return token
        return max(token for token, p in enumerate(law) if p > 0)


def normalised(law: Sequence[Any]) -> list[Any]:
    total = sum(law)
    return [p / total for p in law]


def children(parents: Sequence[int], node: int) -> list[int]:
    return [i for i, parent in enumerate(parents) if parent == node]


def greedy_path(parents: Sequence[int], tokens: Sequence[int], target: Sequence[int]) -> Path:
    """Descends to the first child that carries the target's token. A negative draft is never accepted."""
    path = [0]
    while True:
        matching = [c for c in children(parents, path[-1]) if 0 <= tokens[c] == target[path[-1]]]
        if not matching:
            return path, target[path[-1]]
        path.append(matching[0])


def deterministic_path(
    parents: Sequence[int], tokens: Sequence[int], target: Sequence[Sequence[Any]], chance: Chance
) -> Path:
    """Children are a given set: one draw from the target at each node; descend to the child that carries it."""
    path = [0]
    while True:
        token = chance.draws(path[-1], normalised(target[path[-1]]))
        matching = [c for c in children(parents, path[-1]) if tokens[c] == token]
        if not matching:
            return path, token
        path.append(matching[0])


def drawn_path(
    parents: Sequence[int],
    tokens: Sequence[int],
    draft: Sequence[Sequence[Any]],
    target: Sequence[Sequence[Any]],
    chance: Chance,
    *,
    replacement: bool,
) -> Path:
    """Children are draws, tried in order: accept x with probability min(1, p(x) / q(x)); after a rejection
    p becomes norm(max(p - q, 0)) and, without ``replacement``, q(x) becomes 0. Without it q is the law of the first
    child to begin with, else each child's own. A leaf, or the last rejection, leaves a draw from p."""
    path = [0]
    while True:
        p = normalised(target[path[-1]])
        accepted, q = None, None
        for child in children(parents, path[-1]):
            if q is None or replacement:
                q = normalised(draft[child])
            token = tokens[child]
            if q[token] == 0:
                continue  # it cannot have been drawn: nothing follows from it
            if chance.accepts(child, min(1, p[token] / q[token])):
                accepted = child
                break
            rest = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
            p = normalised(rest) if sum(rest) > 0 else p  # by rounding alone
            if not replacement:
                q = [0 if v == token else b for v, b in enumerate(q)]
                q = normalised(q) if sum(q) > 0 else q
        if accepted is None:
            return path, chance.draws(len(parents), p)
        path.append(accepted)


def typical_path(
    parents: Sequence[int],
    tokens: Sequence[int],
    target: Sequence[Sequence[float]],
    epsilon: float,
    delta: float,
    chance: Chance | None,
) -> Path:
    """The longest path of which every node x has p(x) > min(epsilon, delta exp(-H)) under its parent's law p, with
    H = -sum p log(p + 1e-5); of equals the one with the largest sum of log p, then the first."""
    best = ([0], 0.0)
    for node, parent in enumerate(parents):
        path, score = [node], 0.0
        while parent >= 0:
            p = normalised(target[parent])
            entropy = -sum(x * math.log(x + 1e-5) for x in p)
            if not p[tokens[path[0]]] > min(epsilon, delta * math.exp(-entropy)):
                break
            score += math.log(p[tokens[path[0]]])
            path.insert(0, parent)
            parent = parents[parent]
        if parent == -1 and (len(path), score) > (len(best[0]), best[1]):
            best = (path, score)
    law = normalised(target[best[0][-1]])
    return best[0], law.index(max(law)) if chance is None else chance.draws(0, law)


def pack_ancestors(parents: Tensor) -> tuple[Tensor, Tensor]:
    """parents int32 [B,T] to ancestors int64 [B,T,ceil(T/64)], bit j & 63 of word j >> 6 for each ancestor j of a
    node and for itself, and depths int32 [B,T] (root 0). Padding sees itself alone, at depth 0."""
    batch, nodes = parents.shape
    ancestors = torch.zeros(batch, nodes, -(-nodes // 64), dtype=torch.int64)
    depths = torch.zeros(batch, nodes, dtype=torch.int32)
    for b, row in enumerate(parents.tolist()):
        for i in range(nodes):
            seen = [i]
            while row[seen[-1]] >= 0:
                seen.append(row[seen[-1]])
            depths[b, i] = len(seen) - 1
            for word in {j // 64 for j in seen}:
                bits = sum(1 << j % 64 for j in seen if j // 64 == word)
                ancestors[b, i, word] = bits - (1 << 64) if bits >> 63 else bits
    return ancestors, depths


def _each(parents: Tensor, batch: int, rule: Callable[[int, list[int]], Path]) -> tuple[Tensor, Tensor, Tensor]:
    """nodes int32 [B,T], count int32 [B], next_token int64 [B] of a rule applied to every sequence that is there."""
    rows = parents.expand(batch, -1)
    nodes, count = torch.full(rows.shape, -1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    next_token = torch.full((batch,), -1, dtype=torch.int64)
    for b, row in enumerate(rows.tolist()):
        if row and row[0] == -1:
            path, token = rule(b, row)
            nodes[b, : len(path)] = torch.tensor(path, dtype=torch.int32)
            count[b], next_token[b] = len(path), token
    return nodes, count, next_token


def verify_greedy(parents: Tensor, draft_tokens: Tensor, target_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``greedy_path`` of every sequence; parents [B or 1,T], draft_tokens and target_tokens [B,T] (or logits
    [B,T,V])."""
    if target_tokens.dim() == 3:
        target_tokens = target_tokens.argmax(-1)
    drafts, target = draft_tokens.tolist(), target_tokens.tolist()
    return _each(parents, len(drafts), lambda b, tree: greedy_path(tree, drafts[b], target[b]))


def verify_rejection(
    parents: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    uniforms: Tensor,
    *,
    siblings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``deterministic_path`` or ``drawn_path`` of every sequence; uniforms [B,T+1]."""
    drafts, target, u = draft_tokens.tolist(), target_probs.double().tolist(), uniforms.tolist()
    if draft_probs is None:
        return _each(
            parents, len(drafts), lambda b, tree: deterministic_path(tree, drafts[b], target[b], Uniforms(u[b]))
        )
    laws, replacement = draft_probs.double().tolist(), siblings == "iid"

    def rule(b: int, tree: list[int]) -> Path:
        return drawn_path(tree, drafts[b], laws[b], target[b], Uniforms(u[b]), replacement=replacement)

    return _each(parents, len(drafts), rule)


def verify_typical(
    parents: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``typical_path`` of every sequence; uniforms [B] draw the next token, without them it is the likeliest."""
    drafts, target = draft_tokens.tolist(), target_probs.double().tolist()

    def rule(b: int, tree: list[int]) -> Path:
        chance = None if uniforms is None else Uniforms([uniforms[b].item()])
        return typical_path(tree, drafts[b], target[b], epsilon, delta, chance)

    return _each(parents, len(drafts), rule)
