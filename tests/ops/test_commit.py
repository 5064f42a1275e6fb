"""``commit_kv``: what it moves, and that the cache is then the one that saw only the accepted tokens."""

from __future__ import annotations

import pytest
import torch
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import DIMS
from strategies.layouts import LAYOUTS, memory
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core


@st.composite
def accepted(draw: st.DrawFn, room: int) -> list[int]:
    """Ascending nodes below ``room``; a tree's root or another node may come first."""
    return sorted(draw(st.sets(st.integers(0, room - 1), max_size=room))) if room else []


@pytest.mark.parametrize("page", [None, 1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call(dtype, page, data):
    """Against the reference, compared in all of the memory."""
    batch, capacity = data.draw(st.integers(0, 3)), 12
    starts = [data.draw(st.integers(0, capacity)) for _ in range(batch)]
    nodes = [data.draw(accepted(capacity - start)) for start in starts]
    width = max(map(len, nodes), default=0) + data.draw(st.integers(0, 2))
    rows = torch.tensor([row + [-1] * (width - len(row)) for row in nodes], dtype=torch.int32).view(batch, width)
    rows = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](rows)
    heads = data.draw(st.integers(1, 3))
    shape, options = (batch, capacity), {}
    if page is not None:
        entries = capacity // page
        table = torch.randperm(batch * entries, generator=torch.Generator().manual_seed(1)).int().view(batch, entries)
        shape, options = (batch * entries, page), {"page_table": table}
    caches = []
    for d in (data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(DIMS))):
        place = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
        x = normal(*shape, heads, d, dtype=DTYPES[dtype], seed=d)
        caches.append((place(x), place(x)))
    got, expected = zip(*caches, strict=True)
    ops.commit_kv(*got, rows, int32(*starts), **options)
    reference.commit_kv(*expected, rows, int32(*starts), **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(memory(a), memory(b))


@pytest.mark.parametrize("paged", [False, True])
def test_as_if_only_the_accepted_rows_had_been_appended(paged):
    table = {"page_table": int32(2, 0, 3, 1).view(1, 4)} if paged else {}
    shape = (4, 4, 2, 8) if paged else (1, 16, 2, 8)

    def caches() -> tuple[Tensor, Tensor]:
        return torch.zeros(shape), torch.zeros(shape)

    k, v = normal(1, 9, 2, 8), normal(1, 9, 2, 8, seed=1)
    nodes = [0, 2, 3, 7]
    got, expected = caches(), caches()
    ops.append_kv(*got, k, v, int32(*range(5, 14))[None], **table)
    ops.commit_kv(*got, int32(*nodes, -1)[None], int32(5), **table)
    ops.append_kv(*expected, k[:, nodes], v[:, nodes], int32(5, 6, 7, 8)[None], **table)
    for a, b in zip(got, expected, strict=True):
        for slot in range(9):  # what comes after the accepted tokens is never read
            at = (int(table["page_table"][0, slot // 4]), slot % 4) if paged else (0, slot)
            assert same_bits(a[at], b[at])


def test_bad_nodes_move_nothing():
    caches = normal(2, 8, 1, 3), normal(2, 8, 1, 3, seed=1)
    before = [c.clone() for c in caches]
    for nodes, says in (
        ((0, 2, 2, 1), "nodes: expected ascending nodes, got 1 after 2"),
        ((0, 2, 3, 3), "nodes: expected ascending nodes, got 3 after 3"),
        ((0, 2, -1, 3), "nodes: expected -1 to the end after the first, got 3"),
        ((0, 2, 0, 7), r"nodes: expected places below 8, got 9"),
        ((0, 2, 0, 8), r"nodes: expected values in \[-1, 8\), got 8"),
        ((0, 2, 0, -2), r"nodes: expected values in \[-1, 8\), got -2"),
    ):
        with pytest.raises(RuntimeError, match=f"commit_kv: {says}"):
            ops.commit_kv(*caches, int32(*nodes).view(2, 2), int32(0, 2))
        assert all(same_bits(a, b) for a, b in zip(caches, before, strict=True))
