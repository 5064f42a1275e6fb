"""The lengths of a batch of sequences, and the steps that extend them: what dense and paged caches share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effops.cache.base import AcceptedNodes, Step, TreeNodes


class Lengths:
    """``lengths`` on the host and ``kv_lens`` int32 [B] as a tensor, and where the tokens of the next step go."""

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self.batch_size, self.capacity, self._device = batch_size, capacity, device
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self._range = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self._set_lengths([0] * batch_size)

    @property
    def kv_lens(self) -> Tensor:
        """int32 [B]: keys held of each sequence."""
        return self._kv_lens

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        with torch.inference_mode(False):
            self._kv_lens = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        self._pending: Step | None = None

    def _all(self, length: int) -> Tensor:
        """int32 [B], this length for every sequence."""
        return self._range.as_strided((self.batch_size,), (0,), length)

    def _error(self, argument: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{type(self).__name__}: {argument}: expected {expected}, got {got}")

    def _plan(self, tokens: int, lengths: Sequence[int] | None, tree: TreeNodes | None) -> Step:
        new = [tokens] * self.batch_size if lengths is None else list(lengths)
        if tree is not None:
            if lengths is not None:
                raise self._error("lengths", "None beside a tree", new)
            return self._plan_tree(tokens, tree)
        if len(new) != self.batch_size or not all(0 <= n <= tokens for n in new):
            raise self._error("lengths", f"{self.batch_size} numbers from 0 to {tokens}", new)
        after = [a + b for a, b in zip(self.lengths, new, strict=True)]
        longest = max(after, default=0)
        if longest > self.capacity:
            raise self._error("tokens", f"at most {self.capacity} a sequence", longest)
        if lengths is None:
            if min(self.lengths, default=0) == longest - tokens:  # all alike: views, no arithmetic
                slots = self._range.as_strided((self.batch_size, tokens), (0, 1), longest - tokens)
                kv_lens = self._all(longest)
            else:
                slots = self._kv_lens[:, None] + self._range[:tokens]
                kv_lens = self._kv_lens + tokens
            return Step(slots, slots, kv_lens, after, longest, longest)

        count = torch.tensor(new, dtype=torch.int32, device=self._device)
        kv_lens = self._kv_lens + count
        span = max((n for n, own in zip(after, new, strict=True) if own), default=0)  # of the rows that take part
        column = torch.arange(tokens, dtype=torch.int32, device=self._device)
        padding = column < tokens - count[:, None]
        place = kv_lens[:, None] - tokens + column
        return Step(place.masked_fill(padding, 0), place.masked_fill(padding, -1), kv_lens, after, longest, span)

    def _plan_tree(self, tokens: int, tree: TreeNodes) -> Step:
        """Every node has a slot after the committed keys, in the order of nodes, and the position of its depth."""
        present = tree.present
        if present is not None and len(present) != self.batch_size:
            raise self._error("tree", f"{self.batch_size} sequences", len(present))
        if tree.depths.shape[1] != tokens:
            raise self._error("tree", f"{tokens} nodes", tree.depths.shape[1])
        base = self.lengths if present is None else [n for n, there in zip(self.lengths, present, strict=True) if there]
        longest = max(base, default=0)
        if longest + tokens > self.capacity and base:
            raise self._error("tokens", f"at most {self.capacity} a sequence", longest + tokens)
        after = [n + tokens for n in self.lengths]
        if present is not None and all(present):
            present = None
        if present is None and min(base, default=0) == longest:  # all alike: views, one addition
            positions = (tree.depths + longest).expand(self.batch_size, -1)
            slots = self._range.as_strided((self.batch_size, tokens), (0, 1), longest)
            return Step(positions, slots, self._all(longest + tokens), after, longest + tokens,
                        longest + tree.max_depth + 1, tree)  # fmt: skip
        before = self._kv_lens[:, None]
        positions, slots, kv_lens = before + tree.depths, before + self._range[:tokens], self._kv_lens + tokens
        if present is not None:
            absent = ~torch.tensor(present, dtype=torch.bool, device=self._device)
            positions, slots = positions.masked_fill(absent[:, None], 0), slots.masked_fill(absent[:, None], -1)
            kv_lens = kv_lens.masked_fill(absent, 0)
            after = [n if there else 0 for n, there in zip(after, present, strict=True)]
        return Step(positions, slots, kv_lens, after, longest + tokens, longest + tree.max_depth + 1, tree)

    def _places(self, base: Step, held: list[int], attended: list[int]) -> tuple[Tensor, Tensor]:
        """Slots [B,T] and kv_lens [B] of a step in entries, of which sequences hold fewer than tokens."""
        gone = [n - h for n, h in zip(self.lengths, held, strict=True)]
        if len(set(gone)) == 1 and len(set(attended)) == 1:
            slots, kv_lens = base.slots - gone[0], self._all(attended[0])
        else:
            slots = base.slots - torch.tensor(gone, dtype=torch.int32, device=self._device)[:, None]
            kv_lens = torch.tensor(attended, dtype=torch.int32, device=self._device)
        return slots.masked_fill_(base.slots < 0, -1), kv_lens

    def advance(self, step: Step) -> None:
        if step.tree is not None:
            self._pending = step
            return
        self.lengths, self._kv_lens, self._pending = step.lengths, step.kv_lens, None

    def _accept(self, accepted: AcceptedNodes) -> tuple[Tensor, bool]:
        """Counts the accepted nodes in; the sequences' lengths before them, and whether any row has to move."""
        if self._pending is None:
            raise self._error("accepted", "a step over trees before it", "none")
        nodes, count = accepted.nodes.tolist(), accepted.count.tolist()
        tokens = self._pending.slots.shape[1]
        if len(nodes) != self.batch_size or not all(
            0 <= n <= min(tokens, len(r)) for r, n in zip(nodes, count, strict=True)
        ):
            raise self._error("accepted", f"{self.batch_size} counts up to {tokens}", count)
        starts = self._kv_lens
        moves = any(row[:n] != list(range(n)) for row, n in zip(nodes, count, strict=True))
        self.lengths = [a + b for a, b in zip(self.lengths, count, strict=True)]
        alike = min(self.lengths, default=0) == max(self.lengths, default=0)
        self._kv_lens = self._all(self.lengths[0]) if alike and self.lengths else starts + accepted.count
        self._pending = None
        return starts, moves

    def _for_layers(self, nodes: Tensor, starts: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """The arguments of ``ops.commit_kv`` for all layers as one batch."""
        if self.batch_size == 1:
            return nodes.expand(layers, -1), starts.expand(layers)
        return nodes.repeat(layers, 1), starts.repeat(layers)

    def _shorten(self, lengths: Sequence[int]) -> None:
        after = list(lengths)
        if len(after) != self.batch_size or not all(0 <= n <= m for n, m in zip(after, self.lengths, strict=False)):
            raise self._error("lengths", f"{self.batch_size} numbers up to {self.lengths}", after)
        self._set_lengths(after)

    def _reordered(self, rows: Sequence[int]) -> list[int]:
        if len(rows) != self.batch_size or not all(0 <= r < self.batch_size for r in rows):
            raise self._error("rows", f"{self.batch_size} numbers below {self.batch_size}", list(rows))
        return [self.lengths[r] for r in rows]
