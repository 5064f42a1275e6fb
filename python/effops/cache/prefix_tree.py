"""The paged cache whose sequences share the pages of their common prefixes, and attend to them once: a prefix tree over
token ids (RadixAttention, arXiv 2312.07104) and attention level by level (Hydragen, arXiv 2402.05099)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.paged import PagedKVCache, PagedLayer


class PrefixNode:
    """A page of tokens that some sequence held, after those of its parents."""

    __slots__ = ("block", "children", "page", "parent", "used")

    def __init__(self, block: tuple[int, ...], page: int, parent: PrefixNode | None) -> None:
        self.block, self.page, self.parent = block, page, parent
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.used = 0


@dataclass(slots=True)
class SharedLevel:
    """Consecutive sequences, in tree order, that share ``pages``; none: sequences without a part in this level."""

    groups: list[tuple[int, list[int]]] = field(default_factory=list)  # sequences of each, pages


@dataclass(slots=True)
class Sharing:
    """Which pages of the sequences are shared by whom: ``order`` puts them in the order of the tree, ``levels`` begin
    with the most shared pages, ``own`` says how many pages of each sequence they cover."""

    order: list[int]
    levels: list[SharedLevel]
    own: list[int]


def find_sharing(pages: Sequence[Sequence[int]], least: int) -> Sharing:
    """The tree of the lists' common beginnings. A beginning is a level of its own where it saves ``least`` pages: its
    length for each sequence but one."""
    order = sorted(range(len(pages)), key=lambda b: (list(pages[b]), b))
    own, levels = [0] * len(pages), list[SharedLevel]()

    def visit(first: int, last: int, begin: int, depth: int) -> None:
        """Of sequences order[first:last], whose pages before ``begin`` are the same."""
        low, high = pages[order[first]], pages[order[last - 1]]  # sorted: what these share all do
        end = begin
        while end < min(len(low), len(high)) and low[end] == high[end]:
            end += 1
        if (end - begin) * (last - first - 1) >= least:
            while len(levels) <= depth:
                levels.append(SharedLevel())
            level = levels[depth]
            there = sum(count for count, _ in level.groups)
            level.groups += [(1, [])] * (first - there) + [(last - first, list(low[begin:end]))]
            for b in order[first:last]:
                own[b] = end
            begin, depth = end, depth + 1
        while first < last:
            next_page = pages[order[first]][end : end + 1]
            part = first
            while part < last and pages[order[part]][end : end + 1] == next_page:
                part += 1
            if part - first > 1 and next_page:
                visit(first, part, begin, depth)
            first = part

    if len(pages) > 1:
        visit(0, len(pages), 0, 0)
    for level in levels:
        level.groups += [(1, [])] * (len(pages) - sum(count for count, _ in level.groups))
    return Sharing(order, levels, own)


class SharedTables:
    """A sharing as the op reads it, until sequences share something else."""

    def __init__(self, sharing: Sharing, page: int, device: torch.device) -> None:
        def int32(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []  # lens, page table, ends of groups in sequences
        for level in sharing.levels:
            counts, pages = zip(*level.groups, strict=True)
            width = max(len(own) for own in pages)
            table = int32([own + [0] * (width - len(own)) for own in pages])
            ends = int32([0, *itertools.accumulate(counts)])
            self.levels.append((int32([page * len(own) for own in pages]), table, ends))
        order = sharing.order
        moved = order != sorted(order)
        self.rows = torch.tensor(order, device=device) if moved else None
        self.back = torch.tensor(order, device=device).argsort() if moved else None
        own = [sharing.own[b] for b in order]
        self.covered, self.first = int32([page * n for n in own]), torch.tensor(own, device=device)[:, None]
        self.own = sharing.own
        self.alone = torch.arange(len(order) + 1, dtype=torch.int32, device=device)

    def in_order(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]


@dataclass(slots=True)
class PrefixStep(Step):
    """``shared``: the levels of prefixes, None where none pays; ``own_table`` int32 [B, entries] and ``own_lens`` int32
    [B] the rest of each sequence, in the order of the tree."""

    shared: SharedTables | None = None
    own_table: Tensor | None = None
    own_lens: Tensor | None = None


class PrefixTreeLayer(PagedLayer):
    """Pages of one layer; a step of sequences that share some is a cascade."""

    __slots__ = ()

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        assert isinstance(step, PrefixStep)
        shared = step.shared
        if shared is None or options.get("window"):  # a window of the layer's own: each sequence for itself
            return super().attend(q, step, causal=causal, **options)
        options.pop("window", None)
        assert step.own_lens is not None
        batch, tokens = q.shape[:2]
        levels = [
            ops.KVLevel(self.k, self.v, lens, ends * tokens, table)
            for lens, table, ends in (*shared.levels, (step.own_lens, step.own_table, shared.alone))
        ]
        if step.tree is None:
            options["causal"] = causal
        else:
            masks = {"ancestors": step.tree.ancestors, "depths": step.tree.depths}
            options |= {name: x if x.shape[0] == 1 else shared.in_order(x) for name, x in masks.items()}
        out = ops.cascade_attention(shared.in_order(q).flatten(0, 1), levels, **options)
        assert isinstance(out, Tensor)
        out = out.unflatten(0, (batch, tokens))
        return out if shared.back is None else out[shared.back]


class PrefixTreeKVCache(PagedKVCache):
    """A paged cache that remembers prefixes and attends to shared ones once.

    ``begin`` gives an empty sequence the pages that the tree holds of its tokens; ``keep`` puts a sequence's whole
    pages into the tree, which keeps them when the sequence ends, until a step needs their room: then the leaves that
    were used least recently go. Sequences with the same pages, through the tree, ``fork`` or ``reorder``, share them in
    attention, too: a common beginning is a level of ``ops.cascade_attention`` where it saves reading ``min_saved``
    tokens. Results are those of the paged cache up to rounding.
    """

    def __init__(self, *sizes: int, min_saved: int = 256, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if min_saved < 1:
            raise self._error("min_saved", "1 or more", min_saved)
        self.min_saved = min_saved
        self.layers = [PrefixTreeLayer(layer.k, layer.v) for layer in self.layers]
        self.root = PrefixNode((), -1, None)
        self._clock = 0
        self._shared: SharedTables | None = None
        self._stale = True

    def begin(self, row: int, tokens: Sequence[int]) -> int:
        """Gives sequence ``row``, which is empty, what is held of these tokens: whole pages, and never the last token,
        so that a step has something to compute. Returns how many tokens are held: feed the others."""
        if self.lengths[row]:
            raise self._error("row", "an empty sequence", f"{row} with {self.lengths[row]} tokens")
        nodes = self._find(tokens, (len(tokens) - 1) // self.page_size)
        held = [self.allocator.share(node.page) for node in nodes]
        for page in self.pages[row]:  # of a step that broke off
            self.allocator.release(page)
        self.pages[row] = held
        self._write_table(row, 0)
        lengths = list(self.lengths)
        lengths[row] = len(nodes) * self.page_size
        self._set_lengths(lengths)
        self._stale = True
        return lengths[row]

    def keep(self, row: int, tokens: Sequence[int]) -> None:
        """Puts the whole pages of sequence ``row`` into the tree; ``tokens`` are all that it holds, in order. Where the
        tree holds the same tokens already, the sequence takes its pages."""
        if len(tokens) != self.lengths[row]:
            raise self._error("tokens", f"the {self.lengths[row]} of sequence {row}", len(tokens))
        node, own = self.root, self.pages[row]
        for i, block in enumerate(self._blocks(tokens, len(tokens) // self.page_size)):
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = PrefixNode(block, self.allocator.share(own[i]), node)
            elif child.page != own[i]:
                self.allocator.release(own[i])
                own[i] = self.allocator.share(child.page)
            node = child
            node.used = self._tick()
        self._write_table(row, 0)
        self._stale = True

    def end(self, row: int) -> None:
        """Forgets a sequence; what the tree keeps of it stays."""
        lengths = list(self.lengths)
        lengths[row] = 0
        self.rollback(lengths)

    @property
    def kept_pages(self) -> int:
        """Pages that the tree holds."""
        return sum(1 for _ in self._nodes())

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> Step:
        base = super().plan(tokens, lengths, tree)
        step = PrefixStep(base.positions, base.slots, base.kv_lens, base.lengths, base.max_kv_len, base.span, base.tree,
                          base.page_table)  # fmt: skip
        if self._stale:
            self._find_sharing()
        shared = step.shared = self._shared
        if shared is not None:
            width = max(len(own) - covered for own, covered in zip(self.pages, shared.own, strict=True))
            at = shared.first + torch.arange(max(1, width), device=self._device)
            at = at.clamp(max=self._table.shape[1] - 1)
            step.own_table = shared.in_order(self._table).gather(1, at)
            step.own_lens = (shared.in_order(step.kv_lens) - shared.covered).clamp(min=0)
        return step

    def _find_sharing(self) -> None:
        whole = [own[: n // self.page_size] for own, n in zip(self.pages, self.lengths, strict=True)]
        sharing = find_sharing(whole, -(-self.min_saved // self.page_size))
        self._shared = SharedTables(sharing, self.page_size, self._device) if sharing.levels else None
        self._stale = False

    def _find(self, tokens: Sequence[int], pages: int) -> list[PrefixNode]:
        node, found = self.root, []
        for block in self._blocks(tokens, pages):
            child = node.children.get(block)
            if child is None:
                break
            child.used = self._tick()
            found.append(child)
            node = child
        return found

    def _blocks(self, tokens: Sequence[int], pages: int) -> Iterator[tuple[int, ...]]:
        for i in range(pages):
            yield tuple(tokens[i * self.page_size : (i + 1) * self.page_size])

    def _nodes(self) -> Iterator[PrefixNode]:
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _make_room(self, pages: int) -> None:
        """Drops leaves that no sequence uses, those used least recently first, until so many pages are free; none where
        that cannot be."""
        if self.allocator.free >= pages:
            return
        # Who uses a node uses its parents, too.
        unused = [node for node in self._nodes() if self.allocator.owners[node.page] == 1]
        if self.allocator.free + len(unused) < pages:
            return
        leaves = [(node.used, node) for node in unused if not node.children]  # no two were used at one time
        heapq.heapify(leaves)
        while self.allocator.free < pages:
            _, node = heapq.heappop(leaves)
            parent = node.parent
            assert parent is not None
            del parent.children[node.block]
            self.allocator.release(node.page)
            if parent is not self.root and not parent.children and self.allocator.owners[parent.page] == 1:
                heapq.heappush(leaves, (parent.used, parent))

    def commit(self, accepted: AcceptedNodes) -> None:
        super().commit(accepted)
        self._stale = True

    def rollback(self, lengths: Sequence[int]) -> None:
        super().rollback(lengths)
        self._stale = True

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        self._stale = True
