"""``cascade_attention``: within its bound on any call, and the laws that tie levels to their keys in line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.ops import KVLevel
from effops.reference.bounds import cascade_attention_bound, varlen_attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.cached import ancestor_bits, random_parents
from strategies.cascade import cascades
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]


def attend(q: Tensor, levels: list[KVLevel], **options: Any) -> tuple[Tensor, Tensor]:
    return ops.cascade_attention(q, levels, return_lse=True, **options)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, data):
    case = data.draw(cascades(DTYPES[dtype]))
    got = attend(case.q, case.levels, **case.options)
    assert got[0].dtype == case.q.dtype and got[1].dtype == (torch.float64 if dtype == "f64" else torch.float32)
    for bound, x in zip(cascade_attention_bound(case.q, case.levels, **case.options), got, strict=True):
        assert bound.worst(x) <= 1


@given(data=st.data())
def test_the_bound_is_about_the_reference(data):
    """The merge of exact parts, which the bound is built on, is attention over the concatenation."""
    case = data.draw(cascades(torch.float64, kinds=("normal", "zeros")))
    expected = reference.cascade_attention(case.q, case.levels, return_lse=True, **case.options)
    for bound, x in zip(cascade_attention_bound(case.q, case.levels, **case.options), expected, strict=True):
        assert bound.worst(x) <= 1


def tree_of_prefixes(dtype: torch.dtype) -> tuple[Tensor, list[KVLevel], list[tuple[Tensor, Tensor]]]:
    """Six sequences of two rows: a prefix of all, two of three sequences, own keys; and each one's keys in line."""
    q, dims = normal(12, 4, 48, dtype=dtype), (48, 40)

    def level(groups: int, lens: tuple[int, ...], rows: int, seed: int) -> KVLevel:
        k, v = (normal(groups, max(lens), 2, d, dtype=dtype, seed=seed + d) for d in dims)
        return KVLevel(k, v, int32(*lens), int32(*range(0, 13, rows)))

    levels = [level(1, (1100,), 12, 0), level(2, (70, 129), 6, 1), level(6, (2, 3, 40, 9, 65, 130), 2, 2)]
    whole = []
    for i in range(6):
        parts = [(x.k[g, : x.lens[g]], x.v[g, : x.lens[g]]) for x, g in zip(levels, (0, i // 3, i), strict=True)]
        keys, vals = zip(*parts, strict=True)
        whole.append((torch.cat(keys), torch.cat(vals)))
    return q, levels, whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_the_concatenation(dtype):
    """Within both bounds of causal attention over each sequence's keys in line."""
    q, levels, whole = tree_of_prefixes(DTYPES[dtype])
    k, v = (torch.cat(x) for x in zip(*whole, strict=True))
    ends = [0]
    for keys, _ in whole:
        ends.append(ends[-1] + keys.shape[0])
    call: Any = (q, k, v, int32(*range(0, 13, 2)), int32(*ends))
    options: dict[str, Any] = {"causal": True, "softcap": 4.0, "sink_logits": normal(4, seed=8)}
    flat = ops.varlen_attention(*call, return_lse=True, **options)
    got = attend(q, levels, **options)
    flat_bound = varlen_attention_bound(*call, **options)
    for a, b, one, other in zip(flat, got, flat_bound, cascade_attention_bound(q, levels, **options), strict=True):
        error = one.error + other.error
        assert ((a.double() - b.double()).abs() <= error).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_level_has_the_bits_of_the_other_ops(dtype):
    q, levels, _ = tree_of_prefixes(DTYPES[dtype])
    own = levels[2]
    rows = q.view(6, 2, 4, 48)
    expected = ops.attention(rows, own.k, own.v, kv_lens=own.lens, causal=True, return_lse=True)
    assert same(attend(q, [own], causal=True), tuple(x.flatten(0, 1) for x in expected))
    bits = torch.stack([ancestor_bits(random_parents(2, seed)) for seed in range(6)])
    expected = ops.tree_attention(rows, own.k, own.v, bits, kv_lens=own.lens, return_lse=True)
    assert same(attend(q, [own], ancestors=bits), tuple(x.flatten(0, 1) for x in expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_have_the_bits_of_dense_levels(dtype):
    q, levels, _ = tree_of_prefixes(DTYPES[dtype])
    expected = attend(q, levels, causal=True)
    for page in sized((1, 16, 100), (16,)):
        paged = []
        for level in levels:
            entries = -(-level.k.shape[1] // page)
            padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, entries * page - x.shape[1])) for x in level[:2]]
            count = level.k.shape[0] * entries
            order = torch.randperm(count, generator=torch.Generator().manual_seed(page))
            pages = [torch.empty(count, page, *x.shape[2:], dtype=x.dtype) for x in padded]
            for to, x in zip(pages, padded, strict=True):
                to[order] = x.reshape(count, page, *x.shape[2:])
            table = order.int().view(level.k.shape[0], entries)
            paged.append(KVLevel(*pages, level.lens, level.group_indptr, table))
        mixed = [paged[0], levels[1], paged[2]]
        assert same(attend(q, paged, causal=True), expected)
        assert same(attend(q, mixed, causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_level_changes_nothing_but_rounding(dtype):
    """A level of no keys is neutral, and so is one of no groups."""
    q, levels, _ = tree_of_prefixes(DTYPES[dtype])
    two = [levels[0], levels[2]]
    expected = attend(q, two, causal=True)
    shape = (0, 0, 2, 48), (0, 0, 2, 40)
    nothing = KVLevel(*(q.new_empty(s) for s in shape), int32(), int32(0))
    without = KVLevel(levels[1].k, levels[1].v, int32(0, 0), levels[1].group_indptr)
    for level in (nothing, without):
        assert same(attend(q, [levels[0], level, levels[2]], causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_know_each_other(dtype):
    """A sequence alone has the bits that it has among others while it streams: there its keys' splits are its own."""
    q, levels, _ = tree_of_prefixes(DTYPES[dtype])
    got = attend(q, levels[1:], causal=True)
    first = KVLevel(levels[1].k[:1], levels[1].v[:1], levels[1].lens[:1], int32(0, 6))
    own = KVLevel(levels[2].k[:3], levels[2].v[:3], levels[2].lens[:3], int32(0, 2, 4, 6))
    assert same(attend(q[:6], [first, own], causal=True), tuple(x[:6] for x in got))


def test_rows_of_no_group():
    """Rows past a level's last offset have no keys of it; of no level: 0 and -inf, whatever the sinks."""
    q, levels, _ = tree_of_prefixes(torch.float32)
    shared = levels[0]._replace(group_indptr=int32(0, 9))
    own = levels[2]._replace(group_indptr=int32(0, 1, 2, 3, 4, 5, 6))
    out, lse = attend(q, [shared, own], sink_logits=normal(4, seed=8))
    assert (out[9:] == 0).all() and (lse[9:] == -torch.inf).all()
    alone = attend(q, [shared])
    assert same((out[6:9], lse[6:9]), tuple(x[6:9] for x in alone))
    assert not same_bits(out[:6], alone[0][:6])


def test_nothing_at_all():
    q = normal(0, 4, 48)
    level = KVLevel(normal(1, 5, 2, 48), normal(1, 5, 2, 40), int32(5), int32(0, 0))
    assert [x.shape for x in attend(q, [level, level])] == [(0, 4, 40), (0, 4)]
