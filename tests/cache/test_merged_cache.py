"""The merging cache against a model of it in plain PyTorch, and against the dense cache where nothing has to go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effops import decoding, reference
from effops.cache import DenseKVCache, DenseLayer, MergedKVCache, TreeNodes
from effops.models import Llama, ModelConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from strategies.cached import ancestor_bits
from strategies.values import int32, normal, same_bits
from torch import Tensor

LAYERS, BATCH, HEADS, KV_HEADS, DIM = 2, 2, 4, 2, 4
CAPACITY, SLOTS, HEAVY, RECENT, SINKS = 40, 22, 0.3, 2, 1
CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
)  # fmt: skip


def staying(tokens: int, protected: Tensor) -> int:
    """Entries of a prompt that stay: the budget formula."""
    heavy = int(HEAVY * tokens)
    return tokens if tokens <= heavy + RECENT else RECENT + max(heavy, int(protected[: tokens - RECENT].sum()))


class Sequence:
    """What one sequence holds in a layer: k and v [n,G,D]."""

    def __init__(self) -> None:
        self.k, self.v = torch.empty(0, KV_HEADS, DIM).double(), torch.empty(0, KV_HEADS, DIM).double()

    def step(self, q: Tensor, k: Tensor, v: Tensor, protected: Tensor | None, merging: str) -> Tensor:
        """Attention [n,G,R,D] of the new tokens' queries q [n,G,R,D]; protected bool [n] where they begin it."""
        self.k, self.v = torch.cat([self.k, k]), torch.cat([self.v, v])
        count, new = len(self.k), len(k)
        scores = torch.einsum("ngrd,lgd->gnrl", q, self.k) * DIM**-0.5
        visible = torch.arange(count) <= count - new + torch.arange(new)[:, None]
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out = torch.einsum("gnrl,lgd->ngrd", weights, self.v)
        if protected is not None and staying(new, protected) < new:
            self.compress(weights.sum((1, 2)), protected, staying(new, protected), merging)
        return out

    def compress(self, mass: Tensor, protected: Tensor, stay: int, merging: str) -> None:
        kept = torch.empty(1, KV_HEADS, stay, dtype=torch.int32)
        for g, own in enumerate(mass.tolist()):
            others = range(len(own) - RECENT)
            first = sorted(others, key=lambda j: (not protected[j], -own[j], -j))[: stay - RECENT]
            kept[0, g] = int32(*sorted([*first, *range(len(own) - RECENT, len(own))]))
        k, v = self.k[None].clone(), self.v[None].clone()
        reference.merge_kv(k, v, kept, merging=merging)
        self.k, self.v = k[0, :stay], v[0, :stay]

    def cut(self, gone: int) -> None:
        self.k, self.v = self.k[: len(self.k) - gone], self.v[: len(self.v) - gone]


class MergedMachine(RuleBasedStateMachine):
    merging = "pivotal"

    def __init__(self) -> None:
        super().__init__()
        self.cache = MergedKVCache(
            LAYERS, BATCH, CAPACITY, KV_HEADS, DIM, slots=SLOTS, heavy=HEAVY, recent=RECENT, num_sinks=SINKS,
            merging=self.merging, dtype=torch.float64,
        )  # type: ignore[arg-type]  # fmt: skip
        self.rows = [[Sequence() for _ in range(LAYERS)] for _ in range(BATCH)]
        self.lengths, self.prompts, self.seed = [0] * BATCH, [0] * BATCH, 0

    def draw(self, *shape: int) -> Tensor:
        self.seed += 1
        return normal(*shape, dtype=torch.float64, seed=self.seed)

    @rule(
        counts=st.lists(st.integers(0, 24), min_size=BATCH, max_size=BATCH), ragged=st.booleans(),
        share=st.sampled_from((None, 0.0, 0.3, 0.9)), fails=st.booleans(),
    )  # fmt: skip
    def several(self, counts, ragged, share, fails):
        width = max(counts)
        self.step(width, counts if ragged else [width] * BATCH, ragged, share, fails)

    @rule(there=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), ragged=st.booleans())
    def one(self, there, ragged):
        self.step(1, [int(x) for x in there] if ragged else [1] * BATCH, ragged, None, False)

    def step(self, width: int, counts: list[int], ragged: bool, share: float | None, fails: bool) -> None:
        mask = None if share is None else torch.rand(
            BATCH, width, generator=torch.Generator().manual_seed(self.seed)) < share  # fmt: skip
        self.cache.protect(mask)
        stay = []
        for row, n, length, i in zip(self.rows, counts, self.lengths, range(BATCH), strict=True):
            own = torch.zeros(n, dtype=torch.bool) if mask is None else mask[i, width - n :].clone()
            own[:SINKS] = True
            stay.append((staying(n, own) if length == 0 else len(row[0].k) + n, own if length == 0 and n else None))
        arguments = (width, counts) if ragged else (width,)
        says = None
        if max(n + m for n, m in zip(self.lengths, counts, strict=True)) > CAPACITY:
            says = f"MergedKVCache: tokens: expected at most {CAPACITY} a sequence"
        elif any(s > SLOTS for (s, _), n in zip(stay, counts, strict=True) if n):
            says = f"MergedKVCache: tokens: expected at most {SLOTS} entries a sequence"
        if says:
            with pytest.raises(ValueError, match=says):
                self.cache.plan(*arguments)
            return
        plan = self.cache.plan(*arguments)
        q, k, v = ([self.draw(BATCH, width, h, DIM) for _ in range(LAYERS)] for h in (HEADS, KV_HEADS, KV_HEADS))
        if fails:
            self.cache.layers[0].append(k[0], v[0], plan)
            plan = self.cache.plan(*arguments)
        for index, layer in enumerate(self.cache.layers):
            layer.append(k[index], v[index], plan)
            got = layer.attend(q[index], plan).unflatten(2, (KV_HEADS, -1))
            for b, (row, n, (_, own)) in enumerate(zip(self.rows, counts, stay, strict=True)):
                if n:
                    rows = slice(width - n, width)
                    queries = q[index][b, rows].unflatten(1, (KV_HEADS, -1))
                    expected = row[index].step(queries, k[index][b, rows], v[index][b, rows], own, self.merging)
                    assert torch.allclose(got[b, rows], expected, rtol=1e-9, atol=1e-9)
        self.cache.advance(plan)
        self.prompts = [
            (n if s < n else 0) if own is not None else p
            for p, n, (s, own) in zip(self.prompts, counts, stay, strict=True)
        ]
        self.lengths = [a + n for a, n in zip(self.lengths, counts, strict=True)]

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, rows):
        self.cache.reorder(rows)
        copies = []
        for r in rows:
            copies.append([Sequence() for _ in range(LAYERS)])
            for new, old in zip(copies[-1], self.rows[r], strict=True):
                new.k, new.v = old.k, old.v
        self.rows = copies
        self.lengths, self.prompts = ([x[r] for r in rows] for x in (self.lengths, self.prompts))

    @rule(data=st.data())
    def rollback(self, data):
        after = [data.draw(st.integers(0, n) | st.sampled_from((0, n))) for n in self.lengths]
        if any(0 < n < least for n, least in zip(after, self.prompts, strict=True)):
            with pytest.raises(ValueError, match="MergedKVCache: lengths: expected 0 or numbers from"):
                self.cache.rollback(after)
            return
        self.cache.rollback(after)
        for row, n, m in zip(self.rows, after, self.lengths, strict=True):
            for sequence in row:
                sequence.cut(m - n if n else len(sequence.k))
        self.lengths, self.prompts = after, [p if n else 0 for n, p in zip(after, self.prompts, strict=True)]

    @rule()
    def reset(self):
        self.cache.reset()
        self.rows = [[Sequence() for _ in range(LAYERS)] for _ in range(BATCH)]
        self.lengths, self.prompts = [0] * BATCH, [0] * BATCH

    @invariant()
    def holds_what_it_should(self):
        assert self.cache.lengths == self.cache.kv_lens.tolist() == self.lengths
        for b, row in enumerate(self.rows):
            for layer, sequence in zip(self.cache.layers, row, strict=True):
                n = self.cache.held[b]
                assert n == len(sequence.k)
                for held, expected in ((layer.k, sequence.k), (layer.v, sequence.v)):
                    assert torch.allclose(held[b, :n], expected, rtol=1e-9, atol=1e-12)


class EvictingMachine(MergedMachine):
    merging = "none"


for machine in (MergedMachine, EvictingMachine):
    machine.TestCase.settings = settings(max_examples=50, stateful_step_count=15)
TestMerged, TestEvicting = MergedMachine.TestCase, EvictingMachine.TestCase


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


class _SeesQueries(DenseLayer):
    """No dense layer by its type, so that no op runs the whole model at once; all queries in the last layer, too."""

    needs_queries = True


@pytest.mark.parametrize("options", [{"heavy": 0.7, "recent": 0.42}, {"heavy": 0, "recent": 30}, {"recent": 1.0}])
def test_a_budget_for_all_is_the_dense_cache(model, options):
    """Bit for bit, in passes of any size and of different lengths."""
    dense, merged = model.new_cache(2, 60), model.new_merged_cache(2, 60, **options)
    dense.layers = [_SeesQueries(x.k, x.v) for x in dense.layers]  # type: ignore[misc]
    with torch.inference_mode():
        for i, (count, lengths) in enumerate(((21, [21, 9]), (1, None), (5, [2, 5]), (1, [0, 1]), (8, None))):
            step = [model(tokens(2, count, i), cache, lengths=lengths) for cache in (dense, merged)]
            for b, n in enumerate(lengths or [count] * 2):
                assert same_bits(step[0][b, count - n :], step[1][b, count - n :])
    assert merged.held == merged.lengths == dense.lengths


@given(length=st.integers(1, 60), heavy=st.sampled_from((0.0, 0.1, 0.5, 7)), recent=st.sampled_from((0.1, 0.4, 5)),
       share=st.sampled_from((0.0, 0.2, 0.8, 1.0)), sinks=st.sampled_from((0, 4)), seed=st.integers(0, 99))  # fmt: skip
def test_what_stays(length, heavy, recent, share, sinks, seed):
    """The number of entries by its formula; in each head all protected and recent ones, in the order of positions."""
    protected = torch.rand(1, length, generator=torch.Generator().manual_seed(seed)) < share
    cache = MergedKVCache(1, 1, 60, KV_HEADS, DIM, heavy=heavy, recent=recent, num_sinks=sinks, merging="none")
    cache.protect(protected)
    v = torch.arange(length, dtype=torch.float32)[None, :, None, None].expand(1, -1, KV_HEADS, DIM)
    step = cache.plan(length)
    cache.layers[0].append(normal(1, length, KV_HEADS, DIM, seed=seed), v, step)
    cache.layers[0].attend(normal(1, length, HEADS, DIM, seed=seed + 1), step)
    cache.advance(step)
    newest = max(1, int(recent * length) if isinstance(recent, float) else recent)
    most = int(heavy * length) if isinstance(heavy, float) else heavy
    must = {j for j in range(length - newest) if protected[0, j] or j < sinks}
    assert cache.held == [length if length <= newest + most else newest + max(most, len(must))]
    for g in range(KV_HEADS):
        there = cache.layers[0].v[0, : cache.held[0], g, 0].int().tolist()
        assert there == sorted(set(there)) and must | set(range(max(0, length - newest), length)) <= set(there)


def test_protected_tokens_stay_whole(model):
    """A prompt of nothing but protected tokens is not compressed; the mask is for one prompt."""
    cache = model.new_merged_cache(2, 60, heavy=0.1, recent=0.1)
    cache.protect(torch.ones(2, 30, dtype=torch.bool))
    with torch.inference_mode():
        model(tokens(2, 30), cache)
        assert cache.held == [30, 30]
        cache.rollback([0, 30])
        model(tokens(2, 30), cache, lengths=[30, 0])
    assert cache.held == [3 + 4, 30]


@pytest.mark.parametrize("merging", ["averaged", "pivotal"])
def test_images_of_one_patch(merging):
    """All evicted tokens are copies of one that stays: the cache attends as if their weight had gone to it."""
    cache = MergedKVCache(1, 1, 30, 1, DIM, heavy=0.1, recent=0.1, num_sinks=3, merging=merging)
    k, v = normal(1, 20, 1, DIM), normal(1, 20, 1, DIM, seed=1)
    k[:, 2:18], v[:, 2:18] = k[:, 2:3], v[:, 2:3]
    step = cache.plan(20)
    cache.layers[0].append(k, v, step)
    cache.layers[0].attend(normal(1, 20, 2, DIM, seed=2), step)
    cache.advance(step)
    assert cache.held == [5]
    stay = torch.tensor([0, 1, 2, 18, 19])
    for held, x in ((cache.layers[0].k, k), (cache.layers[0].v, v)):
        assert torch.equal(held[0, :5], x[0, stay])


@pytest.mark.parametrize("merging", ["none", "pivotal"])
def test_generation(model, merging):
    """With room for all, the tokens of the dense cache; with less, as many tokens."""
    prompt = tokens(1, 60)[0].tolist()
    plain = decoding.generate(model, prompt, max_new_tokens=12)
    for share in (1.0, 0.2):
        cache = model.new_merged_cache(1, 100, heavy=share, merging=merging)
        got = decoding.generate(model, prompt, max_new_tokens=12, cache=cache)
        assert len(got.tokens[0]) == 12 and (share < 1 or got.tokens == plain.tokens)
        assert cache.lengths == [71] and cache.held == [71 if share == 1 else 12 + 6 + 11]


def test_the_last_layer_weighs_by_every_query(model):
    """Though one output alone is wanted."""
    caches = [model.new_merged_cache(1, 60) for _ in range(2)]
    with torch.inference_mode():
        for cache, keep in zip(caches, (None, 1), strict=True):
            model(tokens(1, 50), cache, logits_to_keep=keep)
    assert same_bits(*(c.layers[-1].v[:, : c.held[0]] for c in caches))


def test_what_is_refused(model):
    cache = MergedKVCache(1, 2, 50, 2, 4)
    tree = TreeNodes(ancestor_bits([-1, 0])[None], int32(0, 1)[None], 1)
    with pytest.raises(ValueError, match=r"MergedKVCache: tree: expected None .+, got a tree"):
        cache.plan(2, tree=tree)
    with pytest.raises(ValueError, match=r"MergedKVCache: accepted: expected no call: .+, got one"):
        cache.commit(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MergedKVCache: rows: expected 2 numbers below 2, got \[0, 2\]"):
        cache.reorder([0, 2])
    for wrong in (torch.ones(2, 8), torch.ones(1, 8).bool(), torch.ones(8).bool()):
        with pytest.raises(ValueError, match=r"MergedKVCache: tokens: expected bool \[2, T\], got torch"):
            cache.protect(wrong)
    cache.protect(torch.ones(2, 7).bool())
    with pytest.raises(ValueError, match=r"MergedKVCache: protected: expected a mask of the pass's 8 tokens, got \[2"):
        cache.plan(8)
    cache.protect(None)
    step = cache.plan(8)
    cache.layers[0].append(normal(2, 8, 2, 4), normal(2, 8, 2, 4), step)
    with pytest.raises(ValueError, match=r"MergedKVCache: window: expected None or at least 8, .+, got 5"):
        cache.layers[0].attend(normal(2, 8, 4, 4), step, window=5)
    windowed = Llama.random(ModelConfig(**{**CONFIG.__dict__, "windows": (None, 30, None)}))
    with pytest.raises(ValueError, match=r"new_merged_cache: capacity: expected .+ window of 30, got 31"):
        windowed.new_merged_cache(1, 31)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"merging": "mean"}, "merging: expected none, averaged, pivotal or weighted, got 'mean'"),
        ({"heavy": -1}, r"heavy: expected a share in \[0, 1\] or a number of 0 or more, got -1"),
        ({"heavy": 1.5}, "heavy: expected a share .+, got 1.5"),
        ({"recent": 0}, "recent: expected a share .+ or a number of 1 or more, got 0"),
        ({"num_sinks": -1}, "num_sinks: expected 0 or more, got -1"),
        ({"slots": -1}, "slots: expected 0 or more, got -1"),
        ({"least_similarity": float("nan")}, "least_similarity: expected a number or None, got nan"),
    ],
)
def test_wrong_options(changes, says):
    with pytest.raises(ValueError, match=f"MergedKVCache: {says}"):
        MergedKVCache(1, 1, 50, 2, 4, **changes)


def test_bytes():
    """Those of a dense cache of its slots, however long a prompt may be."""
    options: dict[str, Any] = {"v_head_dim": 6, "dtype": torch.bfloat16}
    assert MergedKVCache(3, 2, 1000, 2, 8, slots=70, **options).nbytes == DenseKVCache(3, 2, 70, 2, 8, **options).nbytes
    assert MergedKVCache(1, 1, 10, 2, 8, slots=70).slots == MergedKVCache(1, 1, 10, 2, 8).slots == 10
