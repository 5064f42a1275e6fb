"""The prefix tree: what is shared is found, held and read once; results are those of the paged cache; room is made in
the order of use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effops import ops
from effops.cache import OutOfPagesError, PagedKVCache, PrefixTreeKVCache, TreeNodes
from effops.cache.prefix_tree import find_sharing
from effops.models import Llama, ModelConfig
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import ancestor_bits
from strategies.values import int32
from torch import Tensor

CONFIG = ModelConfig(
    model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.random(CONFIG, std=0.3)


@pytest.fixture
def cascades(monkeypatch) -> list[int]:
    """How many levels each call of the op had."""
    calls: list[int] = []
    plain = ops.cascade_attention

    def counted(q: Tensor, levels: Any, **options: Any) -> Any:
        calls.append(len(levels))
        return plain(q, levels, **options)

    monkeypatch.setattr(ops, "cascade_attention", counted)
    return calls


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def sequences(heads: list[int], ends: list[int]) -> Tensor:
    """Rows whose first 40 tokens are of one of two beginnings, which share 24."""
    common, two, own = tokens(1, 24, seed=1), tokens(2, 16, seed=2), tokens(len(heads), max(ends), seed=3)
    return torch.stack([torch.cat([common[0], two[h], own[i]]) for i, h in enumerate(heads)])


def test_sharing_of_a_tree_by_hand():
    pages = [[1, 2, 3, 9], [1, 2, 3, 4, 5], [7], [1, 2, 6, 8], [1, 2, 6], []]
    found = find_sharing(pages, least=1)
    assert found.order == [5, 1, 0, 4, 3, 2] and found.own == [3, 3, 0, 3, 3, 0]
    first, second = found.levels
    assert first.groups == [(1, []), (4, [1, 2]), (1, [])]
    assert second.groups == [(1, []), (2, [3]), (2, [6]), (1, [])]
    high = find_sharing(pages, least=3)  # [1, 2] for four sequences saves 6 pages, [3] and [6] one each
    assert [level.groups for level in high.levels] == [[(1, []), (4, [1, 2]), (1, [])]] and high.own[0] == 2
    assert find_sharing(pages, least=7).levels == []
    deep = find_sharing([[1, 2, 3], [1, 2, 3], [1, 4]], least=3)  # 1 saves 2 alone; [1, 2, 3] of two saves 3
    assert [level.groups for level in deep.levels] == [[(2, [1, 2, 3]), (1, [])]]


@given(lists=st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=7), least=st.integers(1, 4))
def test_sharing_covers_common_beginnings(lists, least):
    """Levels name what their sequences begin with, in order, no page twice, and only where enough is saved."""
    pages = [[hash_of(own[: i + 1]) for i in range(len(own))] for own in lists]  # a page says what comes before it
    found = find_sharing(pages, least)
    assert sorted(found.order) == list(range(len(pages)))
    covered: list[list[int]] = [[] for _ in pages]
    for level in found.levels:
        at = 0
        for count, shared in level.groups:
            assert not shared or len(shared) * (count - 1) >= least
            for b in found.order[at : at + count]:
                covered[b] += shared
            at += count
        assert at == len(pages)
    for own, shared, count in zip(pages, covered, found.own, strict=True):
        assert own[: len(shared)] == shared and len(shared) == count


def hash_of(prefix: list[int]) -> int:
    return sum((x + 1) * 4**i for i, x in enumerate(prefix))


@pytest.mark.parametrize("heads", [[0, 0, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
def test_a_batch_through_the_tree_is_the_paged_cache(model, cascades, heads):
    """Prompts that share two beginnings, in any order of rows, then decoding."""
    ends = [9, 3, 12, 1, 5]
    whole, batch = sequences(heads, ends), len(heads)
    with torch.inference_mode():
        cache = model.new_prefix_cache(batch, 80, 8, min_saved=16)
        plain = model.new_paged_cache(batch, 80, 8)
        for row in range(batch):  # one after the other, each begins with what is there
            prompt = whole[row, : 40 + ends[row]].tolist()
            held = cache.begin(row, prompt)
            assert held % 8 == 0 and (held >= 24 if row else held == 0)
            rest = torch.tensor([prompt[held:]])
            lengths = [rest.shape[1] if b == row else 0 for b in range(batch)]
            model(rest.expand(batch, -1), cache, lengths=lengths)
            cache.keep(row, prompt)
        lengths = [40 + n for n in ends]
        padded = torch.stack([torch.nn.functional.pad(whole[b, :n], (52 - n, 0)) for b, n in enumerate(lengths)])
        model(padded, plain, lengths=lengths)
        assert cache.lengths == plain.lengths == lengths
        assert cache.free_pages > plain.free_pages
        cascades.clear()
        for i in range(6):
            step = tokens(batch, 1, seed=20 + i)
            assert torch.allclose(model(step, cache), model(step, plain), rtol=1e-4, atol=1e-4), i
    levels = 2 if len(set(heads)) == 1 else 3
    assert cascades == [levels] * 2 * 6


@pytest.mark.parametrize("rows", [[0, 0, 0], [2, 0, 2]])
def test_forks_share(model, cascades, rows):
    """Sequences that reorder made of one: a tree of draft tokens, a commit, ragged steps."""
    prompt, nodes = tokens(3, 50), tokens(3, 4, seed=3)
    tree = TreeNodes(ancestor_bits([-1, 0, 0, 1])[None], int32(0, 1, 1, 2)[None], 2)
    outs = []
    for c in (model.new_prefix_cache(3, 60, 8, min_saved=8), model.new_paged_cache(3, 60, 8)):
        out = []
        with torch.inference_mode():
            model(prompt, c)
            c.reorder(rows)
            out.append(model(nodes, c, tree=tree))
            c.commit(SimpleNamespace(nodes=int32(0, 1, 3, -1).expand(3, 4), count=int32(3, 3, 3)))
            out.append(model(tokens(3, 5, seed=4), c, lengths=[5, 1, 3])[:, -1])
            out += [model(tokens(3, 1, seed=5 + i), c) for i in range(9)]
            c.rollback([50, 52, 30])
            out.append(model(tokens(3, 2, seed=30), c, logits_to_keep=1))
        outs.append(out)
    assert len(cascades) == 2 * 12
    for a, b in zip(*outs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_window_of_a_layer_reads_each_sequence_for_itself(cascades):
    model = Llama.random(CONFIG, std=0.3)
    model.layers[0].self_attn.window = 11
    outs = []
    for c in (model.new_prefix_cache(2, 40, 4, min_saved=4), model.new_paged_cache(2, 40, 4)):
        with torch.inference_mode():
            model(tokens(2, 30), c)
            c.fork(0, 1)
            outs.append(model(tokens(2, 1, seed=1), c))
    assert torch.allclose(*outs, rtol=1e-4, atol=1e-4) and cascades == [2]


def filled(cache: PrefixTreeKVCache, row: int, ids: list[int]) -> int:
    """Feeds a sequence alone what the tree does not hold, and keeps it."""
    held = cache.begin(row, ids)
    rest = len(ids) - held
    lengths = [rest if b == row else 0 for b in range(cache.batch_size)]
    step = cache.plan(rest, lengths)
    kv = torch.tensor(ids[held:], dtype=torch.float32)[None, :, None, None].expand(cache.batch_size, -1, 1, 2)
    cache.layers[0].append(kv, kv, step)
    cache.advance(step)
    cache.keep(row, ids)
    return held


def test_ended_sequences_stay_until_room_is_needed():
    cache = PrefixTreeKVCache(1, 2, 6, 2, 1, 2, capacity=20)
    a, b, c = [1, 2, 3, 4, 5], [1, 2, 9, 9], [7, 7, 7, 7, 7, 7, 7]
    assert filled(cache, 0, a) == 0
    assert filled(cache, 1, b) == 2 and cache.kept_pages == 3
    cache.end(0)
    cache.end(1)
    assert cache.free_pages == 3 and cache.begin(0, a) == 4  # the last page of a is not whole
    cache.end(0)
    assert filled(cache, 1, c) == 0  # four pages: b's second one goes, a's was used since
    assert cache.kept_pages == 5 and cache.free_pages == 0
    cache.end(1)
    assert cache.begin(0, b) == 2 and cache.begin(1, a) == 4
    with pytest.raises(OutOfPagesError):  # a free page and c's three, but not five
        cache.plan(9, [0, 9])
    assert cache.lengths == [2, 4] and cache.kept_pages == 5
    cache.plan(8, [0, 8])
    assert cache.kept_pages == 2 and cache.free_pages == 0


def test_the_tree_holds_a_page_of_tokens_once():
    """Two sequences that computed the same: the second one's copy goes."""
    cache = PrefixTreeKVCache(1, 2, 8, 2, 1, 2)
    ids = [3, 1, 4, 1, 5]
    step = cache.plan(5)
    kv = torch.tensor(ids, dtype=torch.float32)[None, :, None, None].expand(2, -1, 1, 2)
    cache.layers[0].append(kv, kv, step)
    cache.advance(step)
    assert cache.free_pages == 2
    cache.keep(0, ids)
    cache.keep(1, ids)
    assert cache.free_pages == 4 and cache.pages[0][:2] == cache.pages[1][:2] and cache.kept_pages == 2
    cache.rollback([5, 3])
    cache.advance(cache.plan(1, [0, 1]))  # writes into the second page: a copy of its own
    assert cache.pages[0][1] != cache.pages[1][1]


def test_wrong_calls():
    cache = PrefixTreeKVCache(1, 2, 8, 2, 1, 2)
    filled(cache, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="PrefixTreeKVCache: row: expected an empty sequence, got 0 with 3 tokens"):
        cache.begin(0, [1, 2, 3])
    with pytest.raises(ValueError, match="PrefixTreeKVCache: tokens: expected the 3 of sequence 0, got 2"):
        cache.keep(0, [1, 2])
    with pytest.raises(ValueError, match="PrefixTreeKVCache: min_saved: expected 1 or more, got 0"):
        PrefixTreeKVCache(1, 2, 8, 2, 1, 2, min_saved=0)
    assert cache.begin(1, [1, 2]) == 0 and isinstance(cache, PagedKVCache)
