"""The paged KV cache: sequences take pages from a common store as they grow, and may share them."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.memory import cache_memory
from effops.cache.plan import Lengths


class OutOfPagesError(ValueError):
    """A step needs more pages than are free. Nothing has changed."""


class PageAllocator:
    """Pages 0 to ``num_pages - 1`` with a count of their owners; a page without owners is free."""

    def __init__(self, num_pages: int) -> None:
        self.owners = [0] * num_pages
        self._free = list(range(num_pages))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page, with one owner from now on."""
        page = self._free.pop()
        self.owners[page] = 1
        return page

    def share(self, page: int) -> int:
        self.owners[page] += 1
        return page

    def release(self, page: int) -> None:
        self.owners[page] -= 1
        if self.owners[page] == 0:
            self._free.append(page)


class PagedLayer:
    """k [P,page,G,D] and v [P,page,G,Dv] of one layer: views of heads-major memory [P,G,page,D]."""

    __slots__ = ("k", "v")

    needs_queries = False

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        ops.append_kv(self.k, self.v, k, v, step.slots, page_table=step.page_table)

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        return ops.rotary_append(qkv, cos, sin, step.positions, self.k, self.v, step.slots, page_table=step.page_table)

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        assert step.page_table is not None
        options["max_kv_len"] = step.max_kv_len
        if step.tree is None:
            out = ops.paged_attention(q, self.k, self.v, step.page_table, step.kv_lens, causal=causal, **options)
        else:
            out = ops.tree_attention(
                q, self.k, self.v, step.tree.ancestors, depths=step.tree.depths, kv_lens=step.kv_lens,
                page_table=step.page_table, **options,
            )  # fmt: skip
        assert isinstance(out, Tensor)
        return out


class PagedKVCache(Lengths):
    """Keys and values of ``num_layers`` layers in ``num_pages`` pages of ``page_size`` tokens, memory [P,G,page,D] a
    layer. ``capacity`` bounds a sequence; by default all pages may be one's.

    ``fork`` and ``reorder`` share pages; a page is copied when a sequence writes into one that others own too.
    A step that needs more pages than are free raises :class:`OutOfPagesError` and leaves every sequence as it was.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        capacity: int | None = None,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if page_size < 1:
            raise ValueError(f"PagedKVCache: page_size: expected at least 1, got {page_size}")
        shape = (num_layers, num_pages, num_kv_heads, page_size)
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self._k = cache_memory(*shape, head_dim, dtype=dtype, device=device)
            self._v = cache_memory(*shape, v_head_dim or head_dim, dtype=dtype, device=device)
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.pages: list[list[int]] = [[] for _ in range(batch_size)]
        super().__init__(batch_size, num_pages * page_size if capacity is None else capacity, self._k.device)
        with torch.inference_mode(False):
            entries = -(-self.capacity // page_size)
            self._table = torch.zeros(batch_size, entries, dtype=torch.int32, device=device)
            self._first_page = torch.arange(num_layers, dtype=torch.int32, device=device)[:, None, None] * num_pages
        self.k, self.v = self._k.transpose(2, 3), self._v.transpose(2, 3)
        self._as_one_batch = [x.flatten(0, 1).transpose(1, 2) for x in (self._k, self._v)]
        self.layers = [PagedLayer(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self._k, self._v, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of key and value memory."""
        return self._k.nbytes + self._v.nbytes

    @property
    def free_pages(self) -> int:
        return self.allocator.free

    @property
    def page_table(self) -> Tensor:
        """int32 [B, entries]; entries beyond a sequence's pages mean nothing."""
        return self._table

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> Step:
        step = self._plan(tokens, lengths, tree)
        self._provide(step.lengths)
        step.page_table = self._table
        return step

    def _provide(self, lengths: list[int]) -> None:
        """Pages of its own for everything that a sequence writes from its length up to ``lengths``."""
        needed, shared = 0, []  # shared: (row, entry) of pages that this step writes into and others own too
        for row, (own, before, after) in enumerate(zip(self.pages, self.lengths, lengths, strict=True)):
            if after <= before:
                continue
            first, entries = before // self.page_size, -(-after // self.page_size)
            shared += [(row, i) for i in range(first, min(entries, len(own))) if self.allocator.owners[own[i]] > 1]
            needed += max(0, entries - len(own))
        writers = collections.Counter(self.pages[row][i] for row, i in shared)
        needed += sum(min(n, self.allocator.owners[page] - 1) for page, n in writers.items())
        self._make_room(needed)
        if needed > self.allocator.free:
            raise OutOfPagesError(
                f"{type(self).__name__}: tokens: expected a step that needs up to {self.allocator.free} more pages, "
                f"got one that needs {needed}"
            )
        for row, entry in shared:
            self._replace(row, entry)
        for row, (own, after) in enumerate(zip(self.pages, lengths, strict=True)):
            begin = len(own)
            own += [self.allocator.take() for _ in range(-(-after // self.page_size) - begin)]
            self._write_table(row, begin)

    def _make_room(self, pages: int) -> None:
        """Where a cache holds pages that no sequence needs, it may give them back here."""

    def _replace(self, row: int, entry: int) -> None:
        """A copy of the page in its place, unless the other owners have taken copies before."""
        shared = self.pages[row][entry]
        if self.allocator.owners[shared] == 1:
            return
        page = self.allocator.take()
        with torch.no_grad():
            for memory in (self._k, self._v):
                memory[:, page] = memory[:, shared]
        self.allocator.release(shared)
        self.pages[row][entry] = page
        self._write_table(row, entry)

    def _write_table(self, row: int, begin: int) -> None:
        new = self.pages[row][begin:]
        if new:
            with torch.no_grad():
                self._table[row, begin : begin + len(new)] = torch.tensor(new, dtype=torch.int32)

    def _trim(self) -> None:
        """Gives back the pages that hold no token."""
        for own, length in zip(self.pages, self.lengths, strict=True):
            for page in own[-(-length // self.page_size) :]:
                self.allocator.release(page)
            del own[-(-length // self.page_size) :]

    def commit(self, accepted: AcceptedNodes) -> None:
        starts, moves = self._accept(accepted)
        if moves:
            table = (self._table + self._first_page).flatten(0, 1)
            k, v = self._as_one_batch
            nodes, starts = self._for_layers(accepted.nodes, starts, len(self.layers))
            ops.commit_kv(k, v, nodes, starts, page_table=table)
        self._trim()

    def rollback(self, lengths: Sequence[int]) -> None:
        self._shorten(lengths)
        self._trim()

    def fork(self, source: int, target: int) -> None:
        """Sequence ``target`` becomes another reader of ``source``'s pages."""
        rows = list(range(self.batch_size))
        if not (0 <= source < self.batch_size and 0 <= target < self.batch_size):
            raise self._error("fork", f"sequences below {self.batch_size}", (source, target))
        rows[target] = source
        self.reorder(rows)

    def reorder(self, rows: Sequence[int]) -> None:
        lengths = self._reordered(rows)
        held = [self.pages[r][: -(-n // self.page_size)] for r, n in zip(rows, lengths, strict=True)]
        pages = [[self.allocator.share(p) for p in own] for own in held]
        for own in self.pages:
            for page in own:
                self.allocator.release(page)
        self.pages = pages
        self._set_lengths(lengths)
        for row in range(self.batch_size):
            self._write_table(row, 0)

    def reset(self) -> None:
        self.rollback([0] * self.batch_size)
