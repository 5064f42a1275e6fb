"""Token trees: ancestors and depths, absent sequences, one tree for a batch; what all verification ops share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.trees import equal, trees
from strategies.values import int32, normal
from torch import Tensor

pytestmark = pytest.mark.core


@given(data=st.data())
def test_pack_ancestors(data):
    rows = [data.draw(trees(most=12)) for _ in range(data.draw(st.integers(0, 3)))]
    longest = data.draw(st.sampled_from((12, 63, 64, 65, 130)))
    rows = [
        (r + [data.draw(st.sampled_from((-2, len(r) - 1)))] * (r[-1] != -2) + [-2] * longest)[:longest] for r in rows
    ]
    rows += [[-2] * longest, list(range(-1, longest - 1)), [-1] + [0] * (longest - 1)]
    place = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    parents = int32(*itertools.chain(*rows)).view(len(rows), longest)
    assert equal(ops.pack_ancestors(place(parents)), reference.pack_ancestors(parents))


def test_bit_63_is_the_sign():
    ancestors, depths = ops.pack_ancestors(torch.arange(-1, 66, dtype=torch.int32)[None])
    assert ancestors.shape == (1, 67, 2) and depths.tolist() == [list(range(67))]
    assert ancestors[0, 63].tolist() == [-1, 0] and ancestors[0, 64].tolist() == [-1, 1]
    assert ancestors[0, 66].tolist() == [-1, 7] and ancestors[0, 62].tolist() == [2**63 - 1, 0]
    assert [x.shape for x in ops.pack_ancestors(int32().view(2, 0))] == [(2, 0, 0), (2, 0)]


def inputs(nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts, laws of draft and target, and uniforms of 4 sequences and 5 tokens."""
    tokens = torch.randint(0, 5, (4, nodes), generator=torch.Generator().manual_seed(0))
    return tokens, normal(2, 4, nodes, 5).softmax(-1), torch.full((4, nodes + 1), 0.4, dtype=torch.float64)


def every_verification(parents: Tensor, tokens: Tensor, laws: Tensor, u: Tensor) -> list[Any]:
    return [
        ops.verify_greedy(parents, tokens, laws[0].argmax(-1)),
        ops.verify_rejection(parents, tokens, laws[0], laws[1], u, siblings="iid"),
        ops.verify_rejection(parents, tokens, laws[0], laws[1], u, siblings="without_replacement"),
        ops.verify_rejection(parents, tokens, None, laws[1], u, siblings="deterministic"),
        ops.verify_typical(parents, tokens, laws[1]),
    ]


def test_absent_sequences():
    """Rows of padding: no node, no token; their neighbours are as they are alone. No nodes at all: the same."""
    parents = int32(-1, 0, 1, -2, -2, -2, -1, 0, 0, -2, -2, -2).view(4, 3)
    whole = int32(-1, 0, 1, -1, 0, 1, -1, 0, 0, -1, 0, 0).view(4, 3)
    for got, plain in zip(
        every_verification(parents, *inputs(parents.shape[1])),
        every_verification(whole, *inputs(whole.shape[1])),
        strict=True,
    ):
        assert got.nodes[1::2].eq(-1).all() and got.count[1::2].eq(0).all() and got.next_token[1::2].eq(-1).all()
        assert equal([x[::2] for x in got], [x[::2] for x in plain])
    for nothing in (
        every_verification(int32().view(1, 0), *inputs(0)),
        every_verification(int32(-2, -2)[None], *inputs(2)),
    ):
        for got in nothing:
            assert got.count.tolist() == [0] * 4 and got.next_token.tolist() == [-1] * 4 and got.nodes.eq(-1).all()
    empty = ops.verify_greedy(int32(-1, 0)[None], *torch.zeros(2, 0, 2, dtype=torch.int64))
    assert [x.shape for x in empty] == [(0, 2), (0,), (0,)]


def test_one_tree_for_all():
    parents = int32(-1, 0, 0, 1, 2, 2, -2)[None]
    assert all(
        equal(a, b)
        for a, b in zip(
            every_verification(parents, *inputs(parents.shape[1])),
            every_verification(parents.repeat(4, 1), *inputs(7)),
            strict=True,
        )
    )
