"""How far drafts reach on given text: ranks of the true tokens, acceptance tables, trees and their walks."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch
from effops.decoding import MedusaHeads
from torch import Tensor

RANKS = 10
CHUNK = 512  # rows of logits at once

Path = tuple[int, ...]


def rank_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """0-based rank of each row's token, int64 [n] of logits [n, V]; of equal logits the lower id comes first."""
    own = logits.gather(1, tokens[:, None])
    before = torch.arange(logits.shape[1]) < tokens[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(1)


@torch.inference_mode()
def doc_ranks(heads: MedusaHeads, lm_head: Tensor, hidden: Tensor, ids: Tensor) -> Tensor:
    """Ranks int64 [K, n]: of ids[t + 2 + k] in head k at t; -1 beyond the end. Heads that look at the root get ids[t+1]
    in the embedding that is the LM head too."""
    ranks = torch.full((heads.num_heads, len(ids)), -1)
    for begin in range(0, len(ids), CHUNK):
        root = None
        if heads.roots is not None:
            root = lm_head[ids.roll(-1)[begin : begin + CHUNK]]  # the last position has no target
        logits = heads(hidden[begin : begin + CHUNK], lm_head, root=root)
        for k in range(heads.num_heads):
            targets = ids[begin + 2 + k : begin + 2 + k + CHUNK]
            if len(targets):
                ranks[k, begin : begin + len(targets)] = rank_of(logits[k, : len(targets)], targets)
    return ranks


def acceptance_table(ranks: Iterable[Tensor]) -> tuple[list[list[float]], list[int]]:
    """Share of each rank below RANKS a head, [K][RANKS], and the number of positions a head."""
    together = torch.cat(list(ranks), 1)
    valid = [row[row >= 0] for row in together]
    table = [[round((row == r).double().mean().item(), 5) for r in range(RANKS)] for row in valid]
    return table, [len(row) for row in valid]


def best_tree(table: Sequence[Sequence[float]], nodes: int) -> set[Path]:
    """Paths of ranks of a tree of `nodes` nodes, root () included: the most probable, a head's ranks independent."""
    chosen: set[Path] = {()}
    frontier: list[tuple[float, Path]] = [(-table[0][0], (0,))]
    while len(chosen) < nodes and frontier:
        score, path = heapq.heappop(frontier)
        chosen.add(path)
        depth, last = len(path), path[-1]
        if last + 1 < len(table[depth - 1]) and table[depth - 1][last]:
            sibling = score / table[depth - 1][last] * table[depth - 1][last + 1]
            heapq.heappush(frontier, (sibling, (*path[:-1], last + 1)))
        if depth < len(table):
            heapq.heappush(frontier, (score * table[depth][0], (*path, 0)))
    return chosen


def walk_tree(tree: set[Path], ranks: Tensor) -> tuple[int, int]:
    """(tokens, steps) over one document of ranks [K, n] whose every token after the first is emitted.

    A step at t emits token t + 1, which the model itself gives, and the tree's longest match after it.
    """
    columns = ranks.t().tolist()
    t = steps = 0
    while t < len(columns) - 1:
        path: Path = ()
        for rank in columns[t]:
            if (*path, rank) not in tree:
                break
            path = (*path, rank)
        t += len(path) + 1
        steps += 1
    return len(columns) - 1, steps


def walk_chain(length: int, hits: Tensor) -> tuple[int, int]:
    """(tokens, steps) over one document where a draft of `length` tokens is right at t if hits[t], bool [n - 1].

    A step at t emits token t + 1, which the model itself gives, and the drafts after it up to the first wrong one.
    """
    right = hits.tolist()
    t = steps = 0
    while t < len(right):
        t += 1
        for _ in range(length):
            if t >= len(right) or not right[t]:
                break
            t += 1
        steps += 1
    return len(right), steps
