"""The evicting cache against a model of its policies in lists, one entry after the other, and against the dense cache
where nothing has to go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from effops import decoding, ops
from effops.cache import DenseKVCache, DenseLayer, HeavyHitterKVCache, TreeNodes
from effops.cache.kept import heaviest_entries, observed_entries
from effops.models import Llama, ModelConfig
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, BATCH, HEADS, KV_HEADS, DIM = 2, 2, 4, 2, 4
CAPACITY, BUDGET, RECENT, SINKS, MORE = 40, 9, 3, 1, 4
CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
)  # fmt: skip


@dataclass
class Entry:
    position: int
    k: Tensor
    v: Tensor
    mass: float = 0.0


@dataclass
class Head:
    """What one KV head of a sequence holds, and its policy, one entry after the other."""

    policy: str
    pooling: str = "avg"
    kernel: int = 3
    entries: list[Entry] = field(default_factory=list)

    def step(self, q: Tensor, new: list[Entry], compresses: bool) -> Tensor:
        """Attention [n,R,D] of the new tokens' queries q [n,R,D]."""
        if not compresses:
            for entry in new:
                if self.policy == "h2o" and len(self.entries) == BUDGET:
                    may = [e for e in self.entries if SINKS <= e.position <= entry.position - RECENT]
                    self.entries.remove(min(may, key=lambda e: (e.mass, e.position)))
                self.entries.append(entry)
            old = len(self.entries) - len(new)
        else:
            old = len(self.entries)
            self.entries = self.entries + new
        k, v = (torch.stack([getattr(e, name) for e in self.entries]) for name in ("k", "v"))
        scores = torch.einsum("nrd,ld->nrl", q, k) * DIM**-0.5
        visible = torch.arange(len(self.entries)) <= old + torch.arange(len(new))[:, None]
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        if self.policy == "h2o":
            for entry, w in zip(self.entries, weights.sum((0, 1)).tolist(), strict=True):
                entry.mass += w
        if compresses and len(self.entries) > BUDGET:
            self.compress(weights)
        return torch.einsum("nrl,ld->nrd", weights, v)

    def compress(self, weights: Tensor) -> None:
        ordered = sorted(self.entries, key=lambda e: e.position)
        newest = ordered[-1].position
        stay = [e for e in ordered if e.position < SINKS or e.position > newest - RECENT]
        others = [e for e in ordered if not any(e is s for s in stay)]
        if self.policy == "h2o":
            others.sort(key=lambda e: (-e.mass, -e.position))
        else:
            seen = weights[-RECENT:].sum((0, 1)).tolist()
            score = dict(zip((e.position for e in self.entries), seen, strict=True))
            line = [score[e.position] for e in ordered[: len(ordered) - RECENT]]
            half = self.kernel // 2
            near = [line[max(0, i - half) : i + half + 1] for i in range(len(line))]
            pools = {e.position: max(x) if self.pooling == "max" else sum(x) / self.kernel
                     for e, x in zip(ordered, near, strict=False)}  # fmt: skip
            others.sort(key=lambda e: (-pools[e.position], e.position))
        self.entries = sorted(stay + others[: BUDGET - len(stay)], key=lambda e: e.position)


class H2oMachine(RuleBasedStateMachine):
    policy, pooling, slots = "h2o", "avg", BUDGET

    def __init__(self) -> None:
        super().__init__()
        self.cache = HeavyHitterKVCache(
            LAYERS, BATCH, CAPACITY, KV_HEADS, DIM, budget=BUDGET, recent=RECENT, num_sinks=SINKS, dtype=torch.float64,
            policy=self.policy, pooling=self.pooling, kernel_size=3, max_new_tokens=MORE,
        )  # fmt: skip
        self.rows = [self.fresh() for _ in range(BATCH)]
        self.lengths, self.fixed, self.seed = [0] * BATCH, [0] * BATCH, 0

    def fresh(self) -> list[list[Head]]:
        return [[Head(self.policy, self.pooling) for _ in range(KV_HEADS)] for _ in range(LAYERS)]

    def draw(self, *shape: int) -> Tensor:
        self.seed += 1
        return normal(*shape, dtype=torch.float64, seed=self.seed)

    def refused(self, *arguments: Any, says: str) -> None:
        before = self.cache.lengths, list(self.cache.held)
        with pytest.raises(ValueError, match=f"HeavyHitterKVCache: {says}"):
            self.cache.plan(*arguments)
        assert (self.cache.lengths, self.cache.held) == before

    @rule(counts=st.lists(st.integers(0, 6), min_size=BATCH, max_size=BATCH), ragged=st.booleans(), fails=st.booleans())
    def several(self, counts, ragged, fails):
        width = max(counts)
        self.step(width, counts if ragged else [width] * BATCH, ragged, fails)

    @rule(there=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), ragged=st.booleans(), fails=st.booleans())
    def one(self, there, ragged, fails):
        self.step(1, [int(x) for x in there] if ragged else [1] * BATCH, ragged, fails)

    def step(self, width: int, counts: list[int], ragged: bool, fails: bool) -> None:
        held = [len(row[0][0].entries) for row in self.rows]
        most = max((h + n for h, n in zip(held, counts, strict=True) if n), default=0)
        compresses = width > 1 and most > BUDGET
        arguments = (width, counts) if ragged else (width,)
        if max(n + m for n, m in zip(self.lengths, counts, strict=True)) > CAPACITY:
            return self.refused(*arguments, says=f"tokens: expected at most {CAPACITY} a sequence")
        if self.policy == "snapkv" and not compresses and most > self.slots:
            return self.refused(*arguments, says=f"tokens: expected at most {self.slots} entries a sequence")
        plan = self.cache.plan(*arguments)
        assert plan.positions.tolist() == [
            [max(0, i - (width - n)) + length if i >= width - n else 0 for i in range(width)]
            for n, length in zip(counts, self.lengths, strict=True)
        ]
        q, k, v = ([self.draw(BATCH, width, h, DIM) for _ in range(LAYERS)] for h in (HEADS, KV_HEADS, KV_HEADS))
        if fails:
            return self.break_off(k[0], v[0], plan, most)
        for index, layer in enumerate(self.cache.layers):
            layer.append(k[index], v[index], plan)
            got = layer.attend(q[index], plan).unflatten(2, (KV_HEADS, -1))
            for b, (row, n) in enumerate(zip(self.rows, counts, strict=True)):
                for g, head in enumerate(row[index] if n else []):
                    own = range(width - n, width)
                    new = [Entry(self.lengths[b] + i, k[index][b, t, g], v[index][b, t, g]) for i, t in enumerate(own)]
                    rows = q[index][b, width - n :].unflatten(1, (KV_HEADS, -1))[:, g]
                    expected = head.step(rows, new, compresses)
                    assert torch.allclose(got[b, width - n :, g], expected, rtol=1e-9, atol=1e-9)
        self.cache.advance(plan)
        self.lengths = [a + n for a, n in zip(self.lengths, counts, strict=True)]
        ends = zip(self.lengths, self.fixed, counts, strict=True)
        self.fixed = [a if self.policy == "h2o" or (compresses and n) else before for a, before, n in ends]

    def break_off(self, k: Tensor, v: Tensor, plan: Any, most: int) -> None:
        """Before any query: entries that it added are forgotten, those that it evicted are not."""
        self.cache.layers[0].append(k, v, plan)
        if plan.evicts and not plan.compresses:
            self.refused(1, [0] * BATCH, says="plan: expected a reset, for a pass broke off when it had evicted")
            self.reset()

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, rows):
        self.cache.reorder(rows)
        copies = []
        for r in rows:
            copies.append(self.fresh())
            for layer, old in zip(copies[-1], self.rows[r], strict=True):
                for head, before in zip(layer, old, strict=True):
                    head.entries = [Entry(e.position, e.k, e.v, e.mass) for e in before.entries]
        self.rows = copies
        self.lengths, self.fixed = ([x[r] for r in rows] for x in (self.lengths, self.fixed))

    @rule(data=st.data())
    def rollback(self, data):
        """What is gone does not come back; a sequence may always begin again."""
        after = [data.draw(st.integers(0, n) | st.sampled_from((0, n))) for n in self.lengths]
        if any(0 < n < min(m, least) for n, m, least in zip(after, self.lengths, self.fixed, strict=True)):
            with pytest.raises(ValueError, match="HeavyHitterKVCache: lengths: expected 0, the present length"):
                self.cache.rollback(after)
            return
        self.cache.rollback(after)
        for row, n in zip(self.rows, after, strict=True):
            for head in (h for layer in row for h in layer):
                head.entries = [e for e in head.entries if e.position < n]
        self.lengths, self.fixed = after, [min(n, x) for n, x in zip(after, self.fixed, strict=True)]

    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = [self.fresh() for _ in range(BATCH)]
        self.lengths, self.fixed = [0] * BATCH, [0] * BATCH

    @invariant()
    def holds_what_the_policy_keeps(self):
        assert self.cache.lengths == self.cache.kv_lens.tolist() == self.lengths
        for index, layer in enumerate(self.cache.layers):
            for b, row in enumerate(self.rows):
                assert self.cache.held[b] == len(row[index][0].entries) <= self.slots
                for g, head in enumerate(row[index]):
                    positions = layer.positions[b, g].tolist()
                    there = {p: slot for slot, p in enumerate(positions) if 0 <= p < self.lengths[b]}
                    assert sorted(there) == sorted(e.position for e in head.entries)
                    for e in head.entries:
                        slot = there[e.position]
                        assert slot < self.cache.held[b]
                        assert torch.equal(layer.k[b, slot, g], e.k) and torch.equal(layer.v[b, slot, g], e.v)
                        assert layer.mass[b, g, slot].item() == pytest.approx(e.mass, rel=1e-9, abs=1e-12)


class SnapMachine(H2oMachine):
    policy, slots = "snapkv", BUDGET + MORE


class SnapMaximumMachine(SnapMachine):
    pooling = "max"


for machine in (H2oMachine, SnapMachine, SnapMaximumMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestH2o, TestSnap, TestSnapMaximum = H2oMachine.TestCase, SnapMachine.TestCase, SnapMaximumMachine.TestCase


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


class _SeesQueries(DenseLayer):
    """No dense layer by its type, so that no op runs the whole model at once; all queries in the last layer, too."""

    needs_queries = True


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enough_entries_are_the_dense_cache(dtype, policy):
    """Bit for bit, in passes of any size and of different lengths."""
    model = Llama.random(CONFIG, std=0.3, dtype=dtype)
    prompt, more = tokens(2, 50), tokens(2, 9, seed=1)
    caches: list[Any] = [model.new_heavy_hitter_cache(2, 70, budget=61, recent=4, policy=policy)]
    caches.append(model.new_cache(2, 70))
    caches[1].layers = [_SeesQueries(layer.k, layer.v) for layer in caches[1].layers]
    logits = []
    with torch.inference_mode():
        for c in caches:
            steps = [model(prompt, c, lengths=[50, 31], logits_to_keep=2), model(more[:, :5], c)]
            steps += [model(more[:, i : i + 1], c) for i in range(5, 9)]
            logits.append(torch.cat(steps, 1))
    assert same_bits(*logits)


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_a_prompt_beyond_the_budget_is_attended_whole(policy):
    cache = HeavyHitterKVCache(1, 2, 200, 2, 16, budget=20, recent=6, policy=policy)
    q, k, v = normal(2, 150, 6, 16), normal(2, 150, 2, 16, seed=1), normal(2, 150, 2, 16, seed=2)
    step, layer = cache.plan(150), cache.layers[0]
    layer.append(k, v, step)
    assert same_bits(layer.attend(q, step), ops.attention(q, k, v, causal=True))
    cache.advance(step)
    assert cache.held == [20, 20] and cache.lengths == [150, 150]
    assert {*range(4), *range(144, 150)} <= set(layer.positions[1, 1].tolist())


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_what_queries_attend_to_stays(policy):
    """A planted key far from both ends, to which every query turns, and for SnapKV its neighbours."""
    cache = HeavyHitterKVCache(
        1, 1, 300, 1, 16, budget=24, recent=8, num_sinks=2, policy=policy, pooling="max", kernel_size=5
    )
    q, k = normal(1, 200, 2, 16) / 4, normal(1, 200, 1, 16, seed=1) / 4
    q[..., 0], k[0, 77, 0, 0] = 4, 8
    step, layer = cache.plan(200), cache.layers[0]
    layer.append(k, k, step)
    layer.attend(q, step)
    cache.advance(step)
    held = set(layer.positions[0, 0].tolist())
    assert 77 in held and (policy == "h2o" or {75, 76, 78, 79} <= held)


def test_equal_weights_and_numbers_that_are_none():
    """Of equals H2O keeps the newest, as its appends do, and SnapKV the oldest; NaN is more than any number."""
    positions = torch.randperm(10, generator=torch.Generator().manual_seed(1)).int()[None]
    kept = heaviest_entries(torch.ones(1, 10), positions, 4, recent=1, num_sinks=1)
    assert positions.gather(1, kept).tolist() == [[0, 7, 8, 9]]
    weights = torch.ones(1, 10).masked_fill(positions == 3, torch.nan)
    kept = heaviest_entries(weights, positions, 4, recent=1, num_sinks=1)
    assert positions.gather(1, kept).tolist() == [[0, 3, 8, 9]]
    ordered = torch.arange(20, 30).int()[None]
    assert observed_entries(torch.ones(1, 10), ordered, 4, recent=2, num_sinks=0).tolist() == [[0, 1, 8, 9]]


def test_a_sequence_that_begins_again_beside_a_full_one():
    """Nothing of what its slots held before counts."""
    caches = [HeavyHitterKVCache(1, 2, 60, 2, 4, budget=9, recent=3) for _ in range(2)]
    for c, lengths in ((caches[0], None), (caches[1], [0, 8])):
        q, k = normal(2, 8, 4, 4), normal(2, 8, 2, 4, seed=1)
        c.layers[0].append(k, k, step := c.plan(8, lengths))
        c.layers[0].attend(q, step)
        c.advance(step)
    caches[0].rollback([0, 8])
    for c in caches:
        q, k = normal(2, 5, 4, 4, seed=2), normal(2, 5, 2, 4, seed=3)
        c.layers[0].append(k, k, step := c.plan(5))
        assert step.compresses
        c.layers[0].attend(q, step)
        c.advance(step)
    layers = [c.layers[0] for c in caches]
    assert caches[0].held == caches[1].held == [5, 9]
    assert same_bits(layers[0].positions, layers[1].positions)
    assert same_bits(layers[0].mass[0, :, :5], layers[1].mass[0, :, :5])


def test_the_last_layer_counts_every_query(model):
    """Though one output alone is wanted: each token's attention adds up to 1 a query head."""
    cache = model.new_heavy_hitter_cache(2, 100, budget=60, recent=8)
    with torch.inference_mode():
        model(tokens(2, 40), cache, logits_to_keep=1)
        model(tokens(2, 3, seed=1), cache, lengths=[3, 1], logits_to_keep=1)
    for layer in cache.layers:
        for b, length in enumerate((43, 41)):
            assert torch.allclose(layer.mass[b].sum(-1), torch.tensor(2.0 * length), rtol=1e-5)


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_generation(model, policy):
    """With room for all, the tokens of the dense cache; with less, as many tokens."""
    prompt = tokens(1, 60)[0].tolist()
    plain = decoding.generate(model, prompt, max_new_tokens=12)
    for budget in (80, 24):
        cache = model.new_heavy_hitter_cache(1, 100, budget=budget, recent=8, policy=policy)
        got = decoding.generate(model, prompt, max_new_tokens=12, cache=cache)
        assert len(got.tokens[0]) == 12 and (budget < 80 or got.tokens == plain.tokens)
        assert cache.lengths == [71]


def test_what_is_refused(model):
    cache = HeavyHitterKVCache(1, 2, 50, 2, 4, budget=20, recent=6)
    tree = TreeNodes(ancestor_bits([-1, 0])[None], int32(0, 1)[None], 1)
    with pytest.raises(ValueError, match=r"HeavyHitterKVCache: tree: expected None .+, got a tree"):
        cache.plan(2, tree=tree)
    with pytest.raises(ValueError, match=r"HeavyHitterKVCache: accepted: expected no call: .+, got one"):
        cache.commit(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"HeavyHitterKVCache: rows: expected 2 numbers below 2, got \[0, 2\]"):
        cache.reorder([0, 2])
    with pytest.raises(ValueError, match="HeavyHitterKVCache: lengths: expected 2 numbers up to"):
        cache.rollback([1, 0])
    step = cache.plan(8)
    cache.layers[0].append(normal(2, 8, 2, 4), normal(2, 8, 2, 4), step)
    with pytest.raises(ValueError, match=r"HeavyHitterKVCache: window: expected None or at least 8, .+, got 5"):
        cache.layers[0].attend(normal(2, 8, 4, 4), step, window=5)
    windowed = Llama.random(ModelConfig(**{**CONFIG.__dict__, "windows": (None, 30, None)}))
    with pytest.raises(ValueError, match=r"new_heavy_hitter_cache: capacity: expected .+ window of 30, got 31"):
        windowed.new_heavy_hitter_cache(1, 31, budget=20, recent=6)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"policy": "lru"}, "policy: expected h2o or snapkv, got 'lru'"),
        ({"pooling": "sum"}, "pooling: expected avg or max, got 'sum'"),
        ({"kernel_size": 4}, "kernel_size: expected an odd number of 1 or more, got 4"),
        ({"budget": 9}, "budget: expected num_sinks . recent = 4 . 6 or more, recent 1 or more, got 9"),
        ({"recent": 0}, "budget: expected num_sinks . recent = 4 . 0 or more, recent 1 or more, got 20"),
        ({"num_sinks": -1}, "budget: expected num_sinks . recent = -1 . 6 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
    ],
)
def test_wrong_options(changes, says):
    with pytest.raises(ValueError, match=f"HeavyHitterKVCache: {says}"):
        HeavyHitterKVCache(1, 1, 50, 2, 4, **{"budget": 20, "recent": 6, **changes})


def test_bytes():
    """Two rows, a mass and a position an entry, however long a sequence may become."""
    for options, slots in (({"budget": 20}, 20), ({"budget": 20, "policy": "snapkv", "max_new_tokens": 7}, 27)):
        cache = HeavyHitterKVCache(3, 2, 1000, 2, 8, recent=6, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
        dense = DenseKVCache(3, 2, slots, 2, 8, dtype=torch.bfloat16)
        assert cache.nbytes == dense.nbytes + 3 * 2 * 2 * slots * 8
    assert HeavyHitterKVCache(1, 1, 10, 2, 8, budget=99, recent=6).slots == 10
