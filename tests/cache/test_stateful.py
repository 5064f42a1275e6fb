"""Random operations on dense and paged caches against a list of tokens a sequence: what is held, which pages are free,
that nothing leaks, and that a refused step changes nothing."""

from __future__ import annotations

import collections
import itertools
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effops import ops
from effops.cache import (
    DenseKVCache,
    LabelChannels,
    LabelledKVCache,
    OffloadedKVCache,
    OutOfPagesError,
    PagedKVCache,
    PrefixTreeKVCache,
    QuestKVCache,
    StreamingKVCache,
    TreeNodes,
)
from effops.reference.labels import label_values
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from strategies.cached import ancestor_bits, random_parents

LAYERS, BATCH, PAGES, PAGE, HEADS, DIM = 2, 3, 9, 3, 2, 2
CAPACITY = 20


class Machine(RuleBasedStateMachine):
    """A token is a number, unique in a run; its key in layer l and head h is (number, 2 l + h), negated in values."""

    cache: Any

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.new_cache()
        self.held: list[list[int]] = [[] for _ in range(BATCH)]
        self.number = 0

    def new_cache(self) -> Any:
        raise AssertionError("each cache's machine says it")

    def kv(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        number = torch.tensor(tokens, dtype=torch.float32)[:, :, None, None].expand(-1, -1, HEADS, DIM).clone()
        number[..., 1] = torch.arange(HEADS)
        return number, -number

    def fresh(self, rows: list[int], width: int) -> list[list[int]]:
        """New tokens; rows shorter than ``width`` are padded on the left with -7."""
        result = []
        for count in rows:
            result.append([-7] * (width - count) + [self.number + i for i in range(count)])
            self.number += count
        return result

    def write(self, tokens: list[list[int]], step: Any) -> None:
        k, v = self.kv(tokens)
        for index, layer in enumerate(self.cache.layers):
            offset = torch.tensor([0.0, 2.0 * index])
            layer.append(k + offset, v - offset, step)

    def expect_room(self, after: list[int]) -> bool:
        """Whether a step to these lengths is possible; where not, that it is refused and changes nothing."""
        raise AssertionError("each cache's machine says it")

    def plan(self, after: list[int], *args: Any, **kwargs: Any) -> Any:
        before = self.state()
        if self.expect_room(after):
            return self.cache.plan(*args, **kwargs)
        with pytest.raises(ValueError) as error:
            self.cache.plan(*args, **kwargs)
        assert "tokens: expected" in str(error.value)
        assert self.state() == before
        return None

    def state(self) -> Any:
        return list(self.cache.lengths), self.cache.kv_lens.tolist()

    @rule(counts=st.lists(st.integers(0, 5), min_size=BATCH, max_size=BATCH), ragged=st.booleans(), fails=st.booleans())
    def append(self, counts, ragged, fails):
        width = max(counts)
        counts = counts if ragged else [width] * BATCH
        after = [len(own) + n for own, n in zip(self.held, counts, strict=True)]
        step = self.plan(after, width, counts if ragged else None)
        if step is None:
            return
        tokens = self.fresh(counts, width)
        self.write(tokens, step)
        if fails:  # the pass breaks off: the cache is as it was
            return
        self.cache.advance(step)
        for own, new in zip(self.held, tokens, strict=True):
            own += [t for t in new if t >= 0]

    @rule(data=st.data(), nodes=st.integers(1, 6), fails=st.booleans())
    def tree(self, data, nodes, fails):
        present = data.draw(st.none() | st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
        bits = ancestor_bits(random_parents(nodes, self.number))[None]
        depths = torch.zeros(1, nodes, dtype=torch.int32)
        there = present or [True] * BATCH
        after = [len(own) + nodes if here else 0 for own, here in zip(self.held, there, strict=True)]
        step = self.plan(after, nodes, tree=TreeNodes(bits, depths, 0, present))
        if step is None:
            return
        tokens = self.fresh([nodes] * BATCH, nodes)
        self.write(tokens, step)
        self.cache.advance(step)
        assert self.cache.lengths == [len(own) for own in self.held]  # nothing counts before the commit
        if fails:
            return
        chosen = [sorted(data.draw(st.sets(st.integers(0, nodes - 1)))) if here else [] for here in there]
        rows = torch.tensor([own + [-1] * (nodes - len(own)) for own in chosen], dtype=torch.int32)
        self.cache.commit(SimpleNamespace(nodes=rows, count=torch.tensor([len(own) for own in chosen]).int()))
        for own, new, keep in zip(self.held, tokens, chosen, strict=True):
            own += [new[i] for i in keep]

    @rule(data=st.data())
    def rollback(self, data):
        lengths = [data.draw(st.integers(0, len(own))) for own in self.held]
        self.cache.rollback(lengths)
        self.held = [own[:n] for own, n in zip(self.held, lengths, strict=True)]

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, rows):
        self.cache.reorder(rows)
        self.held = [list(self.held[r]) for r in rows]

    @precondition(lambda self: self.number % 3 == 0)
    @rule()
    def reset(self):
        self.cache.reset()
        self.held = [[] for _ in range(BATCH)]

    @invariant()
    def holds_what_was_appended(self):
        assert self.cache.lengths == self.cache.kv_lens.tolist() == [len(own) for own in self.held]
        for index, layer in enumerate(self.cache.layers):
            for row, own in enumerate(self.held):
                k, v = self.kv([own])
                offset = torch.tensor([0.0, 2.0 * index])
                for memory, expected in ((layer.k, k + offset), (layer.v, v - offset)):
                    assert torch.equal(self.read(memory, row, len(own)), expected[0])

    def read(self, memory: torch.Tensor, row: int, length: int) -> torch.Tensor:
        raise AssertionError("each cache's machine says it")


class DenseMachine(Machine):
    def new_cache(self) -> Any:
        return DenseKVCache(LAYERS, BATCH, CAPACITY, HEADS, DIM)

    def expect_room(self, after):
        return max(after) <= CAPACITY

    def read(self, memory, row, length):
        return memory[row, :length]


ORDER = (torch.arange(LAYERS * HEADS).view(LAYERS, HEADS, 1) + torch.arange(DIM)) % DIM
RANGE = torch.zeros(LAYERS, HEADS, DIM)
CHANNELS = LabelChannels(ORDER.int(), RANGE, RANGE + 255)


class LabelledMachine(DenseMachine):
    """Labels follow their keys: the channels in the order of each layer and head."""

    bits = 8

    def new_cache(self) -> Any:
        return LabelledKVCache(
            LAYERS, BATCH, CAPACITY, HEADS, DIM, channels=CHANNELS, budget=8, num_channels=2, bits=self.bits, window=4
        )

    @invariant()
    def holds_the_labels_of_its_keys(self):
        for layer in self.cache.layers:
            for row, own in enumerate(self.held):
                channels = layer.channels.long().expand(len(own), -1, -1)
                expected = layer.k[row, : len(own)].gather(-1, channels) - layer.offsets
                got = label_values(layer.labels[row : row + 1, : len(own)], 2, self.bits)[0]
                assert torch.equal(got, expected.double().clamp(-128, 127) if self.bits else expected.double())


class NumberLabelsMachine(LabelledMachine):
    bits = 0


class OffloadedMachine(LabelledMachine):
    """Every step attends, too: what was fetched before is never what another token left there."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        super().__init__()

    def new_cache(self) -> Any:
        options = {"channels": CHANNELS, "budget": 8, "num_channels": 2, "bits": self.bits}
        return OffloadedKVCache(
            LAYERS,
            BATCH,
            CAPACITY,
            HEADS,
            DIM,
            directory=self.directory.name,
            num_sinks=1,
            window=2,
            dense_layers=0,
            **options,
        )

    @rule(seed=st.integers(0, 9), counts=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def decode(self, seed, counts):
        lengths = [int(x) for x in counts]
        after = [len(own) + n for own, n in zip(self.held, lengths, strict=True)]
        step = self.plan(after, 1, lengths)
        if step is None:
            return
        tokens = self.fresh(lengths, 1)
        q = torch.randn(BATCH, 1, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
        k, v = self.kv(tokens)
        for index, layer in enumerate(self.cache.layers):
            offset = torch.tensor([0.0, 2.0 * index])
            layer.append(k + offset, v - offset, step)
            got = layer.attend(q, step)
            lists = None
            if step.max_kv_len > 8:
                lists = ops.label_topk(q, layer.labels, layer.channels, 8, kv_lens=step.kv_lens, num_sinks=1, window=2,
                                       bits=self.bits, scales=layer.scales)  # fmt: skip
            expected = (
                ops.attention(q, layer.k, layer.v, causal=True, kv_lens=step.kv_lens, max_kv_len=step.max_kv_len)
                if lists is None
                else ops.sparse_attention(q, layer.k, layer.v, lists, kv_lens=step.kv_lens)
            )
            assert torch.equal(got, expected)
        self.cache.advance(step)
        for own, new in zip(self.held, tokens, strict=True):
            own += [t for t in new if t >= 0]

    def teardown(self):
        del self.cache
        self.directory.cleanup()


class QuestMachine(DenseMachine):
    """Every key lies within the bounds of its page."""

    PAGE = 4

    def new_cache(self) -> Any:
        return QuestKVCache(LAYERS, BATCH, CAPACITY, HEADS, DIM, page=self.PAGE, budget=12, num_sinks=1, window=4)

    @invariant()
    def holds_bounds_of_its_keys(self):
        for layer in self.cache.layers:
            for row, own in enumerate(self.held):
                pages = torch.arange(len(own)) // self.PAGE
                keys = layer.k[row, : len(own)]
                assert (layer.low[row, pages] <= keys).all() and (keys <= layer.high[row, pages]).all()


class PagedMachine(Machine):
    def new_cache(self) -> Any:
        return PagedKVCache(LAYERS, BATCH, PAGES, PAGE, HEADS, DIM, capacity=CAPACITY)

    def state(self) -> Any:
        c = self.cache
        return super().state(), [list(own) for own in c.pages], list(c.allocator.owners), c.free_pages

    def expect_room(self, after):
        """Pages beyond those a sequence has, and copies of shared ones that it writes into: all of a page's writers but
        one, or all of them where another reader stays."""
        if max(after) > CAPACITY:
            return False
        needed, writers = 0, collections.Counter()
        for own, length, n in zip(self.cache.pages, self.cache.lengths, after, strict=True):
            if n > length:
                needed += max(0, -(-n // PAGE) - len(own))
                writers.update(own[length // PAGE : -(-n // PAGE)])
        owners = collections.Counter(p for own in self.cache.pages for p in own)
        return needed + sum(min(n, owners[p] - 1) for p, n in writers.items()) <= self.cache.free_pages

    @rule(source=st.integers(0, BATCH - 1), reader=st.integers(0, BATCH - 1))
    def fork(self, source, reader):
        self.cache.fork(source, reader)
        self.held[reader] = list(self.held[source])

    @invariant()
    def no_page_is_lost_or_owned_twice(self):
        c = self.cache
        owners = collections.Counter(p for own in c.pages for p in own)
        assert [owners[p] for p in range(PAGES)] == c.allocator.owners
        assert c.free_pages == sum(n == 0 for n in c.allocator.owners)
        assert sorted(c.allocator._free) == [p for p in range(PAGES) if owners[p] == 0]

    @rule()
    def a_commit_or_rollback_frees_what_holds_no_token(self):
        self.cache.rollback(self.cache.lengths)
        used = {p for own in self.cache.pages for p in own}
        assert all(len(own) == -(-len(held) // PAGE) for own, held in zip(self.cache.pages, self.held, strict=True))
        assert self.cache.free_pages == PAGES - len(used)

    def read(self, memory, row, length):
        entries = self.cache.page_table[row, : -(-length // PAGE)].long()
        return memory[entries].flatten(0, 1)[:length]


class PrefixTreeMachine(PagedMachine):
    """Sequences begin with what earlier ones left in the tree; nothing that a sequence holds is ever given away."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[list[int]] = []

    def new_cache(self) -> Any:
        return PrefixTreeKVCache(LAYERS, BATCH, PAGES, PAGE, HEADS, DIM, capacity=CAPACITY, min_saved=1)

    def state(self) -> Any:
        return super().state(), sorted(node.page for node in self.cache._nodes())

    def expect_room(self, after):
        """As much as is free, and what the tree alone holds."""
        if max(after) > CAPACITY:
            return False
        needed, writers = 0, collections.Counter()
        for own, length, n in zip(self.cache.pages, self.cache.lengths, after, strict=True):
            if n > length:
                needed += max(0, -(-n // PAGE) - len(own))
                writers.update(own[length // PAGE : -(-n // PAGE)])
        owners = self.cache.allocator.owners
        needed += sum(min(n, owners[p] - 1) for p, n in writers.items())
        return needed <= self.cache.free_pages + sum(owners[node.page] == 1 for node in self.cache._nodes())

    @rule(row=st.integers(0, BATCH - 1), ends=st.booleans())
    def keep(self, row, ends):
        self.cache.keep(row, self.held[row])
        if ends:
            self.ended.append(self.held[row])
            self.cache.end(row)
            self.held[row] = []

    @precondition(lambda self: any(not own for own in self.held))
    @rule(data=st.data(), more=st.integers(0, 4))
    def begin(self, data, more):
        row = next(i for i, own in enumerate(self.held) if not own)
        earlier = data.draw(st.sampled_from([[], *self.ended]))
        ids = earlier[: data.draw(st.integers(0, len(earlier)))] + [self.number + i for i in range(more)]
        self.number += more
        held = self.cache.begin(row, ids)
        assert held % PAGE == 0 and held <= max(0, len(ids) - 1)
        self.held[row] = ids[:held]

    @invariant()
    def levels_read_what_sequences_hold(self):
        self.cache._find_sharing()
        shared = self.cache._shared
        if shared is None:
            return
        for b, count in enumerate(shared.own):
            assert count * PAGE <= len(self.held[b])
        found: list[list[int]] = [[] for _ in range(BATCH)]
        rows = shared.in_order(torch.arange(BATCH)).tolist()
        for lens, table, ends in shared.levels:
            for group, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
                for b in rows[first:last]:
                    found[b] += table[group, : int(lens[group]) // PAGE].tolist()
        assert found == [own[:count] for own, count in zip(self.cache.pages, shared.own, strict=True)]

    @invariant()
    def no_page_is_lost_or_owned_twice(self):
        c = self.cache
        owners = collections.Counter(p for own in c.pages for p in own) + collections.Counter(
            node.page for node in c._nodes()
        )
        assert [owners[p] for p in range(PAGES)] == c.allocator.owners
        assert sorted(c.allocator._free) == [p for p in range(PAGES) if owners[p] == 0]

    @rule()
    def a_commit_or_rollback_frees_what_holds_no_token(self):
        self.cache.rollback(self.cache.lengths)
        used = {p for own in self.cache.pages for p in own} | {node.page for node in self.cache._nodes()}
        assert self.cache.free_pages == PAGES - len(used)


class StreamingMachine(Machine):
    """The second layer's first head is full; the others hold sinks and at least what a query sees."""

    WINDOW, SINKS, STEP = 4, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.reached = [0] * BATCH  # the longest that each sequence was, with steps that broke off

    def new_cache(self) -> Any:
        full = torch.tensor([[False, False], [True, False]])
        return StreamingKVCache(
            LAYERS, BATCH, CAPACITY, HEADS, DIM, window=self.WINDOW, num_sinks=self.SINKS, full_heads=full,
            step_tokens=self.STEP, page_size=PAGE,
        )  # fmt: skip

    def plan(self, after, tokens, *args, **kwargs):
        first = "tree" not in kwargs and not any(self.held)
        self.fits = tokens <= self.STEP or first
        return super().plan(after, tokens, *args, **kwargs)

    def expect_room(self, after):
        room = self.fits and max(after) <= CAPACITY
        if room:
            self.reached = [max(x) for x in zip(self.reached, after, strict=True)]
        return room

    @rule(data=st.data())
    def rollback(self, data):
        lengths = [data.draw(st.integers(0, len(own))) for own in self.held]
        ring = -(-(self.WINDOW - 1 + self.STEP) // PAGE) * PAGE
        lost = [
            0 < n < len(own) and max(n - self.WINDOW + 1, PAGE) + ring < reached
            for n, own, reached in zip(lengths, self.held, self.reached, strict=True)
        ]
        if any(lost):
            before = self.state()
            with pytest.raises(ValueError, match=f"lengths: expected 0 or at least .+ sequence {lost.index(True)}"):
                self.cache.rollback(lengths)
            assert self.state() == before
            return
        self.cache.rollback(lengths)
        self.held = [own[:n] for own, n in zip(self.held, lengths, strict=True)]
        self.reached = [n if own else 0 for n, own in zip(self.reached, self.held, strict=True)]

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, rows):
        super().reorder(rows)
        self.reached = [self.reached[r] for r in rows]

    @precondition(lambda self: self.number % 3 == 0)
    @rule()
    def reset(self):
        super().reset()
        self.reached = [0] * BATCH

    @invariant()
    def holds_what_was_appended(self):
        assert self.cache.lengths == self.cache.kv_lens.tolist() == [len(own) for own in self.held]
        for index, layer in enumerate(self.cache.layers):
            for row, own in enumerate(self.held):
                k, v = self.kv([own])
                offset = torch.tensor([0.0, 2.0 * index])
                for head, full in enumerate(layer.full.tolist()):
                    seen = [j for j in range(len(own)) if full or j < self.SINKS or j >= len(own) + 1 - self.WINDOW]
                    at = torch.tensor(seen, dtype=torch.long)
                    pages = layer.page_table[row, head, at // PAGE].long()
                    for memory, expected in ((layer.k, k + offset), (layer.v, v - offset)):
                        assert torch.equal(memory[pages, at % PAGE, head], expected[0, at, head])


for machine in (
    DenseMachine, LabelledMachine, NumberLabelsMachine, OffloadedMachine, PagedMachine, PrefixTreeMachine,
    QuestMachine, StreamingMachine,
):  # fmt: skip
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestDense, TestPaged, TestStreaming = DenseMachine.TestCase, PagedMachine.TestCase, StreamingMachine.TestCase
TestPrefixTree, TestQuest = PrefixTreeMachine.TestCase, QuestMachine.TestCase
TestOffloaded = OffloadedMachine.TestCase
TestLabelled, TestNumberLabels = LabelledMachine.TestCase, NumberLabelsMachine.TestCase


def test_out_of_pages_names_what_is_free():
    c = PagedKVCache(1, 2, num_pages=4, page_size=4, num_kv_heads=1, head_dim=2)
    c.advance(c.plan(7))
    says = "PagedKVCache: tokens: expected a step that needs up to 0 more pages, got one that needs 2"
    with pytest.raises(OutOfPagesError, match=says):
        c.plan(2)
    assert c.lengths == [7, 7] and c.free_pages == 0
    c.advance(c.plan(1))
    c.rollback([8, 0])
    assert c.free_pages == 2
    c.advance(c.plan(1, [1, 0]))
    assert c.lengths == [9, 0] and c.free_pages == 1


def test_commit_is_appending_the_accepted_rows_alone():
    """Contents, lengths and free pages, bit for bit, over both caches."""
    for new in (lambda: DenseKVCache(1, 2, 16, 1, 4), lambda: PagedKVCache(1, 2, 8, 4, 1, 4)):
        with_tree, plain = new(), new()
        first, k = torch.randn(2, 3, 1, 4), torch.randn(2, 6, 1, 4)
        for c in (with_tree, plain):
            step = c.plan(3)
            c.layers[0].append(first, first, step)
            c.advance(step)
        bits = ancestor_bits([-1, 0, 0, 1, 2, 4])[None]
        step = with_tree.plan(6, tree=TreeNodes(bits, torch.tensor([[0, 1, 1, 2, 2, 3]]).int(), 3))
        assert step.positions.tolist()[0] == [3, 4, 4, 5, 5, 6] and step.span == 7
        with_tree.layers[0].append(k, k, step)
        with_tree.advance(step)
        nodes = torch.tensor([[0, 2, 4, 5], [0, 1, -1, -1]], dtype=torch.int32)
        with_tree.commit(SimpleNamespace(nodes=nodes, count=torch.tensor([4, 2], dtype=torch.int32)))
        step = plain.plan(4, [4, 2])
        accepted = torch.stack([k[0, [0, 2, 4, 5]], k[1, [0, 0, 0, 1]]])
        plain.layers[0].append(accepted, accepted, step)
        plain.advance(step)
        assert with_tree.lengths == plain.lengths == [7, 5]
        for c in (with_tree, plain):
            assert c.kv_lens.tolist() == [7, 5] and getattr(c, "free_pages", 4) == 4
        for b, n in enumerate((7, 5)):
            for name in ("k", "v"):
                a, e = (getattr(c.layers[0], name) for c in (with_tree, plain))
                if isinstance(with_tree, PagedKVCache):
                    a, e = (x[c.page_table[b].long()].flatten(0, 1) for x, c in ((a, with_tree), (e, plain)))
                else:
                    a, e = a[b], e[b]
                assert torch.equal(a[:n], e[:n])


def test_wrong_calls():
    c = DenseKVCache(1, 2, 8, 1, 2)
    tree = TreeNodes(ancestor_bits([-1, 0])[None], torch.tensor([[0, 1]], dtype=torch.int32), 1)
    accepted = SimpleNamespace(nodes=torch.tensor([[0], [0]]).int(), count=torch.tensor([1, 1]).int())
    with pytest.raises(ValueError, match="DenseKVCache: accepted: expected a step over trees before it, got none"):
        c.commit(accepted)
    with pytest.raises(ValueError, match=r"DenseKVCache: lengths: expected None beside a tree, got \[1, 1\]"):
        c.plan(2, [1, 1], tree)
    with pytest.raises(ValueError, match="DenseKVCache: tree: expected 3 nodes, got 2"):
        c.plan(3, tree=tree)
    c.advance(c.plan(2, tree=tree))
    accepted.count += 5
    with pytest.raises(ValueError, match=r"DenseKVCache: accepted: expected 2 counts up to 2, got \[6, 6\]"):
        c.commit(accepted)
    for lengths in ([1, 0], [0], [-1, 0]):
        with pytest.raises(ValueError, match="DenseKVCache: lengths: expected 2 numbers up to"):
            c.rollback(lengths)
    with pytest.raises(ValueError, match=r"DenseKVCache: rows: expected 2 numbers below 2, got \[0, 2\]"):
        c.reorder([0, 2])
    with pytest.raises(ValueError, match="PagedKVCache: page_size: expected at least 1, got 0"):
        PagedKVCache(1, 2, 8, 0, 1, 2)
    with pytest.raises(ValueError, match=r"PagedKVCache: fork: expected sequences below 2, got \(0, 2\)"):
        PagedKVCache(1, 2, 8, 4, 1, 2).fork(0, 2)
