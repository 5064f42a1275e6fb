"""``tree_attention``: within its bound on any call, and the laws that tie trees to plain causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effops import ops, reference
from effops.reference.bounds import attention_bound, tree_attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import ancestor_bits, random_parents, trees
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def attend(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.tree_attention(*tensors, return_lse=True, **options)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(trees(DTYPES[dtype]))
    got = attend(*case.tensors, **case.options)
    for bound, x in zip(tree_attention_bound(*case.tensors, **case.options), got, strict=True):
        assert bound.worst(x) <= 1


@pytest.mark.parametrize("tokens", [1, 4, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_is_causal_attention(dtype, tokens):
    """Bit for bit, given depths or counted ones. With a window shorter than the tree, blocks of rows begin at another
    key: there within both bounds."""
    q = normal(2, tokens, 4, 40, dtype=DTYPES[dtype])
    k, v = (normal(2, 300, 2, d, dtype=q.dtype, seed=d) for d in (40, 24))
    bits, lens = ancestor_bits(list(range(-1, tokens - 1)))[None], int32(300, 170)
    depths = torch.arange(tokens, dtype=torch.int32)[None]
    masks: list[dict[str, Any]] = [
        {}, {"window": 37, "num_sinks": 4}, {"head_windows": int32(0, 20)},
        {"softcap": 2.0, "sink_logits": normal(4, seed=9), "kv_starts": int32(0, 30)},
    ]  # fmt: skip
    for options in masks:
        expected = ops.attention(q, k, v, kv_lens=lens, causal=True, return_lse=True, **options)
        got = attend(q, k, v, bits, kv_lens=lens, **options)
        assert same(attend(q, k, v, bits, depths=depths, kv_lens=lens, **options), got)
        if tokens > 20 and options.keys() & {"window", "head_windows"}:
            bounds = attention_bound(q, k, v, kv_lens=lens, causal=True, **options)
            for bound, a, b in zip(bounds, expected, got, strict=True):
                assert bound._replace(value=a.double()).worst(b) <= 2
        else:
            assert same(got, expected)


@pytest.mark.parametrize("tokens", [5, 12, 66])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_node_is_plain_decoding_along_its_path(dtype, tokens):
    """Each row against causal attention over committed keys and its ancestors' keys alone, windows included."""
    committed, parents = 150, random_parents(tokens, 3)
    q = normal(1, tokens, 4, 32, dtype=DTYPES[dtype])
    k, v = (normal(1, committed + tokens, 2, d, dtype=q.dtype, seed=d) for d in (32, 16))
    for options in ({}, {"window": 6}, {"window": 60, "num_sinks": 2}):
        got = attend(q, k, v, ancestor_bits(parents)[None], **options)
        for i in range(tokens):
            path, node = [], i
            while node >= 0:
                path, node = [committed + node, *path], parents[node]
            own = q[:, i : i + 1], *(torch.cat([x[:, :committed], x[:, path]], 1) for x in (k, v))
            plain = ops.attention(*own, causal=True, return_lse=True, **options)
            for bound, a, b in zip(attention_bound(*own, causal=True, **options), plain, got, strict=True):
                assert bound._replace(value=a.double()).worst(b[:, i : i + 1]) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_order_of_nodes_permutes_the_rows(dtype, data):
    """Another numbering of the same tree: rows permuted, within both bounds; a duplicate leaf gives an equal row."""
    tokens = data.draw(st.integers(1, 40))
    parents = random_parents(tokens, data.draw(st.integers(0, 99)))
    bits = reference.tree_mask(ancestor_bits(parents))
    order = torch.tensor(data.draw(st.permutations(range(tokens))))
    q = normal(1, tokens, 2, 16, dtype=DTYPES[dtype])
    k, v = (normal(1, 90 + tokens, 1, 16, dtype=q.dtype, seed=s) for s in (1, 2))
    plain = attend(q, k, v, reference.pack_mask(bits)[None])
    moved = torch.cat([torch.arange(90), 90 + order])
    shuffled = reference.pack_mask(bits[order][:, order])[None]
    got = attend(q[:, order], k[:, moved], v[:, moved], shuffled)
    bounds = tree_attention_bound(q[:, order], k[:, moved], v[:, moved], shuffled)
    for bound, a, b in zip(bounds, plain, got, strict=True):
        assert bound._replace(value=a[:, order].double()).worst(b) <= 2

    leaf = tokens - 1
    twice = [*range(tokens), leaf]
    rows = torch.cat([torch.arange(90), 90 + torch.tensor(twice)])
    double = reference.pack_mask(reference.tree_mask(ancestor_bits([*parents, parents[leaf] if tokens > 1 else -1])))
    got = attend(q[:, twice], k[:, rows], v[:, rows], double[None])
    for bound, b in zip(tree_attention_bound(q[:, twice], k[:, rows], v[:, rows], double[None]), got, strict=True):
        assert bound._replace(value=b[:, leaf:tokens].double(), error=bound.error[:, tokens:]).worst(b[:, tokens:]) <= 2


def test_duplicate_leaves_of_exact_numbers_are_equal():
    """Values from a coarse grid and equal scores leave nothing to round: the rows are equal bit for bit."""
    q = torch.zeros(1, 4, 2, 16)
    k, v = normal(1, 12, 1, 16), normal(1, 12, 1, 16, seed=1).round()
    k[:, 11], v[:, 11] = k[:, 9], v[:, 9]
    bits = ancestor_bits([-1, 0, 0, 0])[None]  # rows 1 and 3 see 8 + 2 keys
    out, lse = attend(q, k, v, bits)
    assert same_bits(out[:, 1], out[:, 3]) and same_bits(lse[:, 1], lse[:, 3])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_one_tree_for_all_and_bits_beyond_it(dtype):
    tokens, q = 9, normal(3, 9, 4, 16, dtype=DTYPES[dtype])
    k, v = (normal(3, 100, 2, 16, dtype=q.dtype, seed=s) for s in (1, 2))
    bits, lens = ancestor_bits(random_parents(tokens, 1))[None], int32(100, 9, 60)
    expected = attend(q, k, v, bits.repeat(3, 1, 1), kv_lens=lens)
    assert same(attend(q, k, v, bits, kv_lens=lens), expected)
    assert same(attend(q, k, v, bits | (-1 << tokens), kv_lens=lens), expected)


def test_trees_of_different_size():
    """Ragged queries: each sequence's own tree, its mask in the first rows of the common tensor."""
    sizes, lens = [1, 7, 0, 20], [50, 7, 0, 90]
    bits = torch.full((4, 20, 1), -1, dtype=torch.int64)
    for b, n in enumerate(sizes):
        bits[b, :n] = ancestor_bits(random_parents(n, b))[:n] if n else bits[b, :0]
    q, k, v = normal(28, 4, 16), normal(4, 90, 2, 16, seed=1), normal(4, 90, 2, 16, seed=2)
    offsets = int32(0, 1, 8, 8, 28)
    got = attend(q, k, v, bits, kv_lens=int32(*lens), cu_seqlens_q=offsets, max_q_len=20)
    for b, n in enumerate(sizes):
        rows = slice(int(offsets[b]), int(offsets[b]) + n)
        alone = attend(q[None, rows], k[b : b + 1], v[b : b + 1], bits[b : b + 1, :n, : -(-n // 64)],
                       kv_lens=int32(lens[b]))  # fmt: skip
        assert same(tuple(x[0] for x in alone), tuple(x[rows] for x in got))


def test_absent_sequences_and_short_ones():
    q, k, bits = normal(2, 4, 2, 8), normal(2, 9, 1, 8, seed=1), ancestor_bits([-1, 0, 1, 1])[None]
    out, lse = attend(q, k, k, bits, kv_lens=int32(0, 9))
    assert out[0].eq(0).all() and lse[0].eq(-torch.inf).all() and lse[1].isfinite().all()
    with pytest.raises(RuntimeError, match="tree_attention: kv_lens: expected 0 or at least the tree's T = 4, got 3"):
        attend(q, k, k, bits, kv_lens=int32(9, 3))
    with pytest.raises(RuntimeError, match="tree_attention: kv_lens: expected a tensor beside page_table, got None"):
        attend(q, k, k, bits, page_table=int32(0, 1).view(2, 1))
    blind = attend(q, k, k, torch.zeros_like(bits))  # rows see the committed keys alone
    alone = ops.attention(q, k[:, :5], k[:, :5], return_lse=True)
    assert same(blind, alone)


def test_the_mask_is_read_for_the_last_keys_alone():
    """Committed keys are seen whatever the bits say, also where they share a tile with the tree."""
    q, k = normal(1, 3, 1, 8), normal(1, 40, 1, 8, seed=1)
    only_self = reference.pack_mask(torch.eye(3, dtype=torch.bool))[None]
    out, lse = attend(q, k, k, only_self)
    for i in range(3):
        keys = torch.cat([k[:, :37], k[:, 37 + i : 38 + i]], 1)
        expected = reference.attention(q[:, i : i + 1], keys, keys, return_lse=True)
        torch.testing.assert_close(out[:, i : i + 1], expected[0])
        torch.testing.assert_close(lse[:, i : i + 1], expected[1])
