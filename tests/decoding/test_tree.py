"""``TokenTree``: its derived parts against their definitions, its constructors, and the optimum against every tree."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from effops import ops
from effops.decoding import TokenTree
from hypothesis import given
from hypothesis import strategies as st
from strategies.trees import trees

MEDUSA = [(0,), (0, 0), (1,), (0, 1), (2,), (1, 0), (0, 0, 0)]


@given(trees(most=90, widest=5, padding=False))
def test_parts(parents):
    tree = TokenTree(parents)
    assert tree.parents == tuple(parents) and len(tree) == len(parents)
    assert tree.children == tuple(tuple(c for c, p in enumerate(parents) if p == i) for i in range(len(parents)))
    assert tree.leaves == tuple(i for i, below in enumerate(tree.children) if not below)
    ancestors, depths = ops.pack_ancestors(torch.tensor([parents], dtype=torch.int32))
    assert torch.equal(tree.ancestors(), ancestors[0]) and tree.depths == tuple(depths[0].tolist())
    assert tree.max_depth == max(tree.depths)
    assert tree.ranks == tuple(-1 if p < 0 else tree.children[p].index(i) for i, p in enumerate(parents))
    paths = tree.paths()
    assert tuple(path[-1] for path in paths) == tree.leaves
    for path in paths:
        assert [parents[i] for i in path] == [-1, *path[:-1]] and [tree.depths[i] for i in path] == [*range(len(path))]
    assert set(itertools.chain(*paths)) == set(range(len(parents)))


def test_from_paths():
    """Nodes go by length, then lexicographically; the order in which paths come means nothing, nor do repetitions."""
    tree = TokenTree.from_paths(MEDUSA)
    assert tree.parents == (-1, 0, 0, 0, 1, 1, 2, 4) and tree.ranks == (-1, 0, 1, 2, 0, 1, 0, 0)
    assert tree.depths == (0, 1, 1, 1, 2, 2, 2, 3) and tree.paths() == ((0, 3), (0, 1, 5), (0, 2, 6), (0, 1, 4, 7))
    assert all(TokenTree.from_paths(order) == tree for order in (MEDUSA[::-1], [*MEDUSA, *MEDUSA], map(list, MEDUSA)))
    assert TokenTree.from_paths([]) == TokenTree([-1]) == TokenTree.chain(1) == TokenTree.full([])


def test_chain_and_full():
    assert TokenTree.chain(4).parents == (-1, 0, 1, 2) and TokenTree.chain(1024).max_depth == 1023
    full = TokenTree.full([3, 2])
    assert full.parents == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert full == TokenTree.from_paths([p for n in (1, 2) for p in itertools.product(*map(range, (3, 2)[:n]))])


def test_equality_hash_pickle_repr():
    tree, gaps = TokenTree.from_paths(MEDUSA), TokenTree.from_paths([(1,), (3,), (3, 2)])
    assert gaps.parents == TokenTree([-1, 0, 0, 2]).parents and gaps != TokenTree([-1, 0, 0, 2])
    assert len({tree, TokenTree(tree.parents), gaps, TokenTree(gaps.parents, gaps.ranks)}) == 2
    assert tree != tree.parents
    for one in (tree, gaps):
        assert pickle.loads(pickle.dumps(one)) == one == eval(repr(one))
    assert repr(gaps) == "TokenTree([-1, 0, 0, 2], ranks=[-1, 1, 3, 2])"


def test_truncated():
    tree = TokenTree.from_paths(MEDUSA)
    assert tree.truncated() == tree == tree.truncated(99, 99)
    assert tree.truncated(max_depth=1) == TokenTree.from_paths([(0,), (1,), (2,)])
    assert tree.truncated(max_nodes=6) == TokenTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1)])
    assert tree.truncated(max_depth=0) == tree.truncated(max_nodes=1) == TokenTree([-1])
    deep_first = TokenTree([-1, 0, 1, 2, 0, 4], ranks=[-1, 5, 0, 0, 3, 1])
    assert deep_first.truncated(2, 5) == TokenTree([-1, 0, 1, 0, 3], ranks=[-1, 5, 0, 3, 1])


def every_tree(widths: list[int], most: int) -> Iterator[TokenTree]:
    """All trees of paths whose ranks lie below ``widths``."""
    paths = [p for n in range(1, len(widths) + 1) for p in itertools.product(*map(range, widths[:n]))]
    for size in range(min(most, len(paths) + 1)):
        for chosen in itertools.combinations(paths, size):
            if all(len(p) == 1 or p[:-1] in chosen for p in chosen):
                yield TokenTree.from_paths(chosen)


probability = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0)), st.floats(0, 1))


@given(data=st.data())
def test_optimal(data):
    """No tree within the sizes emits more a second; ranks in any order, impossible and certain ones too."""
    widths = data.draw(st.sampled_from(([2, 2], [3, 1], [1, 1, 1], [2, 1, 1], [4])))
    table = [data.draw(st.lists(probability, min_size=w, max_size=w)) for w in widths]
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True))
    times = {n: data.draw(st.floats(0.1, 4)) for n in sizes}

    def seconds(n: int) -> float:
        below, above = max(m for m in times if m <= n), min(m for m in times if m >= n)
        return times[below] + (times[above] - times[below]) * (n - below) / max(above - below, 1)

    def rate(tree: TokenTree) -> float:
        return tree.expected(table) / seconds(len(tree))

    found = TokenTree.optimal(table, times)
    allowed = [t for t in every_tree(widths, max(sizes)) if min(sizes) <= len(t)]
    if allowed:
        assert min(sizes) <= len(found) <= max(sizes)
        assert rate(found) >= max(map(rate, allowed)) * (1 - 1e-12)
    else:  # the table has no more paths
        assert len(found) == 1 + sum(itertools.accumulate(widths, lambda a, b: a * b))


def test_optimal_weighs_size_against_time():
    table = [[0.1, 0.6, 0.2], [0.5, 0.3]]
    assert TokenTree.optimal(table, {1: 1.0, 8: 1.0}) == TokenTree.from_paths(
        [(1,), (1, 0), (2,), (1, 1), (0,), (2, 0), (2, 1)]
    )
    assert TokenTree.optimal(table, {1: 1.0, 2: 1.7}) == TokenTree.chain(1)
    # 1.9 tokens in 1.1 s of three nodes, against 1.6 in 1.05 s (between the sizes) and 2.1 in 1.35 s.
    assert TokenTree.optimal(table, {1: 1.0, 3: 1.1, 5: 1.6}) == TokenTree.from_paths([(1,), (1, 0)])
    big = TokenTree.optimal([[0.9**r for r in range(1, 40)]] * 20, {1: 1.0, 1024: 1.001})
    assert len(big) == 1024


def test_expected():
    tree = TokenTree.from_paths(MEDUSA)
    assert tree.expected([[0.5, 0.25], [0.5, 0.25]]) == 1 + 0.5 + 0.25 + 0.25 + 0.125 + 0.125
    assert TokenTree.chain(4).expected([[0.5]] * 3) == 1.875 and TokenTree([-1]).expected([]) == 1


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: TokenTree([]), "parents: expected 1 to 1024 nodes, got 0"),
        (lambda: TokenTree(range(-1, 1024)), "parents: expected 1 to 1024 nodes, got 1025"),
        (lambda: TokenTree([0]), r"parents: expected -1 \(the root\), got 0 at index 0"),
        (lambda: TokenTree([-1, -1]), "parents: expected an earlier node, got -1 at index 1"),
        (lambda: TokenTree([-1, 0, -2]), "parents: expected an earlier node, got -2 at index 2"),
        (lambda: TokenTree([-1, 2**32]), "parents: expected an earlier node, got 4294967296 at index 1"),
        (lambda: TokenTree([-1, 0], ranks=[-1]), "ranks: expected 2, got 1"),
        (lambda: TokenTree([-1, 0], ranks=[]), "ranks: expected 2, got 0"),
        (lambda: TokenTree([-1, 0], ranks=[0, 0]), r"ranks: expected -1 \(the root\), got 0 at index 0"),
        (lambda: TokenTree([-1, 0, 0], ranks=[-1, 3, 3]), "ranks: expected 0 or more, different .+, got 3 at index 2"),
        (lambda: TokenTree.from_paths([(0,), (1, 0)]), r"choices: .+ prefix of a path, got \(1, 0\) without \(1,\)"),
        (lambda: TokenTree.from_paths([()]), r"choices: expected paths of one rank or more .+, got \(\)"),
        (lambda: TokenTree.from_paths([(-1,)]), r"choices: expected ranks of 0 or more, got \(-1,\)"),
        (lambda: TokenTree.from_paths([(i,) for i in range(1024)]), "choices: expected 1 to 1024 nodes, got 1025"),
        (lambda: TokenTree.chain(0), "n: expected 1 to 1024 nodes, got 0"),
        (lambda: TokenTree.full([2, 0]), "widths: expected numbers of 1 or more, got 0"),
        (lambda: TokenTree.full([2] * 10), "widths: expected 1 to 1024 nodes, got more"),
        (lambda: TokenTree.full([2**62] * 3), "widths: expected 1 to 1024 nodes, got more"),
        (lambda: TokenTree.chain(2).truncated(max_nodes=0), "max_nodes: expected 1 or more, got 0"),
        (lambda: TokenTree.chain(2).truncated(max_depth=-1), "max_depth: expected 0 or more, got -1"),
        (lambda: TokenTree.chain(2).expected([[0.5, 1.5]]), r"acceptance: expected .+, got 1.5 at index \[0, 1\]"),
        (lambda: TokenTree.optimal([[float("nan")]], {1: 1.0}), r"acceptance: expected .+, got nan at index \[0, 0\]"),
        (lambda: TokenTree.optimal([], {}), "step_times: expected one size or more, got none"),
        (lambda: TokenTree.optimal([], {0: 1.0}), "step_times: expected 1 to 1024 nodes, got 0"),
        (lambda: TokenTree.optimal([], {2: 0.0}), "step_times: expected seconds above 0, got 0 for size 2"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ValueError, match=f"^TokenTree: {says}"):
        make()
