"""``verify_greedy`` and ``verify_rejection`` against their rules, decision by decision."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.reference import speculative as rules
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.trees import check, draw_uniforms, equal, trees
from strategies.values import int32, normal

pytestmark = pytest.mark.core

# Laws are weights of up to 32 in all. In float64 a normalised one is off by 20 u or less, u = 2^-53, V <= 6; a residual
# divides what it is off by by its own sum. The sums of three in a row multiply to no less than 32^-4, for they are
# fractions over one denominator. So every probability that a decision looks at is off by 3 * 40 u * 32^4 < 2e-8.
EPS = 1e-7


class Margins(rules.Uniforms):
    """Exact decisions, and how near they were."""

    def __init__(self, values: list[float]) -> None:
        super().__init__([Fraction(u) for u in values])
        self.closest: Any = 1

    def accepts(self, node: int, probability: Any) -> bool:
        self.closest = min(self.closest, abs(self.values[node] - probability))
        return super().accepts(node, probability)

    def draws(self, place: int, law: Any) -> int:
        edges = itertools.accumulate(law[:-1])
        self.closest = min([self.closest, *(abs(self.values[place] - edge) for edge in edges)])
        return super().draws(place, law)


def draw_laws(data: st.DataObject, nodes: int, vocab: int) -> list[list[int]]:
    """Rows of integers that sum to 32 or less, with zeros."""
    row = st.lists(st.sampled_from((0, 0, 1, 2, 3, 5)), min_size=vocab, max_size=vocab).filter(any)
    return data.draw(st.lists(row, min_size=nodes, max_size=nodes))


def exact(law: list[int]) -> list[Fraction]:
    return [Fraction(x) for x in law]


@given(data=st.data())
def test_greedy(data):
    """Few tokens, so that siblings repeat; negative ones on both sides."""
    tree = data.draw(trees(most=12))
    token = st.lists(st.integers(-1, 2), min_size=len(tree), max_size=len(tree))
    drafts, target = data.draw(token), data.draw(token)
    got = ops.verify_greedy(int32(*tree)[None], torch.tensor([drafts]), torch.tensor([target]))
    check(got, *rules.greedy_path(tree, drafts, target), len(tree))


@given(data=st.data())
def test_siblings_in_another_order(data):
    """Under greedy verification the same tokens are accepted, whatever the order of (different) siblings."""
    tree = data.draw(trees(most=10, padding=False))
    drafts = [0] + [tree[:i].count(p) for i, p in enumerate(tree) if i]
    target = [data.draw(st.integers(0, 2)) for _ in tree]
    order, waiting = [], [0]  # another order with parents before children
    while waiting:
        order.append(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
        waiting += rules.children(tree, order[-1])
    place = {node: i for i, node in enumerate(order)}
    moved = [place.get(tree[node], -1) for node in order]
    plain = ops.verify_greedy(int32(*tree)[None], torch.tensor([drafts]), torch.tensor([target]))
    other = ops.verify_greedy(int32(*moved)[None], torch.tensor([drafts])[:, order], torch.tensor([target])[:, order])
    check(other, [place[i] for i in plain.nodes[0].tolist() if i >= 0], int(plain.next_token), len(tree))


@pytest.mark.parametrize("siblings", ["iid", "without_replacement", "deterministic"])
@settings(max_examples=sized(200, 40))
@given(data=st.data())
def test_rejection(siblings, data):
    """Against the rule in fractions, where no decision is nearer than EPS."""
    tree, vocab = data.draw(trees()), data.draw(st.integers(1, 6))
    nodes = len(tree)
    target, draft = draw_laws(data, nodes, vocab), draw_laws(data, nodes, vocab)
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=nodes, max_size=nodes))
    u = draw_uniforms(data, nodes + 1)
    chance, p, q = Margins(u), [exact(x) for x in target], [exact(x) for x in draft]
    if siblings == "deterministic":
        path, token = rules.deterministic_path(tree, tokens, p, chance)
    else:
        path, token = rules.drawn_path(tree, tokens, q, p, chance, replacement=siblings == "iid")
    assume(chance.closest > EPS)
    place = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    drafts = None if siblings == "deterministic" else torch.tensor([draft]).float()
    laws, given = torch.tensor([target]).float(), torch.tensor([u]).double()
    call = int32(*tree)[None], torch.tensor([tokens]), drafts, laws, given
    check(ops.verify_rejection(*(x if x is None else place(x) for x in call), siblings=siblings), path, token, nodes)
    assert equal(ops.verify_rejection(*call, siblings=siblings), reference.verify_rejection(*call, siblings=siblings))


@pytest.mark.parametrize("siblings", ["iid", "without_replacement", "deterministic"])
def test_rejection_over_many_tokens(siblings):
    """More tokens than lanes, more work than one thread takes, whatever the threads; one tree for the whole batch."""
    batch, vocab, tree = 40, 3001, [-1, 0, 0, 1, 0, 2, 1, 3, 3, 4]
    target = (3 * normal(batch, len(tree), vocab)).softmax(-1)
    draft = (target.log() + normal(batch, len(tree), vocab, seed=1)).softmax(-1)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(batch, -1)
    u = torch.rand(batch, len(tree) + 1, generator=generator, dtype=torch.float64)
    u[:, 1:-1] /= 4  # some are accepted
    if siblings == "deterministic":
        tokens = (
            target[:, [max(p, 0) for p in tree]]
            .topk(4)
            .indices.gather(
                2, torch.tensor([tree[:i].count(p) for i, p in enumerate(tree)]).expand(batch, -1)[..., None]
            )[..., 0]
        )
    call = int32(*tree)[None], tokens, None if siblings == "deterministic" else draft, target, u
    got = ops.verify_rejection(*call, siblings=siblings)
    assert equal(got, reference.verify_rejection(*call, siblings=siblings))
    assert len(set(got.count.tolist())) >= 3
    torch.set_num_threads(3)
    assert equal(ops.verify_rejection(int32(*tree).expand(batch, -1), *call[1:], siblings=siblings), got)


def rejection(tree: list[int], tokens: list[int], draft: Any, target: Any, u: list[float], siblings: str) -> Any:
    drafts = None if draft is None else torch.tensor([draft]).float()
    return ops.verify_rejection(
        int32(*tree)[None], torch.tensor([tokens]), drafts, torch.tensor([target]).float(),
        torch.tensor([u], dtype=torch.float64), siblings=siblings,
    )  # fmt: skip


def test_edges_of_a_decision():
    """Probabilities that are exact: u < p / q accepts, u = p / q does not."""
    below = math.nextafter(0.5, 0)
    for u, count, token in ((below, 2, 0), (0.5, 1, 1)):
        got = rejection([-1, 0], [9, 0], [[1, 1], [1, 1]], [[1, 3], [1, 0]], [0, u, 0.25], "iid")
        assert (got.count.tolist(), got.next_token.tolist()) == ([count], [token])
    assert rejection([-1, 0], [9, 0], [[1, 1], [1, 1]], [[0, 3], [1, 0]], [0, 0, 0], "iid").count == 1  # p = 0, u = 0
    for u, token in ((0, 1), (below, 1), (0.5, 3), (math.nextafter(1, 0), 3)):  # tokens of probability 0 are not drawn
        for siblings, draft in (("deterministic", None), ("iid", [[1] * 5])):
            assert rejection([-1], [9], draft, [[0, 1, 0, 1, 0]], [u, u], siblings).next_token == token


def test_a_draft_that_cannot_have_been_drawn():
    """q(x) = 0: rejected, and the law left is the same; drafts beyond q's last token too."""
    got = rejection([-1, 0], [9, 0], [[1, 1], [0, 1]], [[1, 1], [1, 0]], [0, 0, 0.25], "iid")
    assert got.count == 1 and got.next_token == 0
    one = [[0, 1, 0]] * 4
    got = rejection([-1, 0, 0, 0], [9, 1, 1, 2], one, [[1, 1, 2]] * 4, [0, 0.99, 0, 0, 0.4], "without_replacement")
    assert got.count == 1 and got.next_token == 2  # what the first one left: 1/3, 0, 2/3


def test_equal_laws_accept_always():
    law = [0.3, 0.1, 0.6]
    for siblings, token in itertools.product(("iid", "without_replacement"), range(3)):
        got = rejection([-1, 0, 1], [9, token, 2], [law] * 3, [law] * 3, [0.999999] * 4, siblings)
        assert got.count == 3 and got.next_token == 2


@pytest.mark.parametrize("siblings", ["iid", "without_replacement", "deterministic"])
@given(data=st.data())
def test_temperature_0_is_greedy(siblings, data):
    """A target that is certain: whatever was drafted and whatever the uniforms."""
    tree, vocab = data.draw(trees()), data.draw(st.integers(3, 5))
    draft = (2 * normal(1, len(tree), vocab, seed=data.draw(st.integers(0, 99)))).softmax(-1)
    tokens = [data.draw(st.integers(0, vocab - 1)) for _ in tree]
    if siblings == "without_replacement":
        tokens = [(tokens[p] + tree[:i].count(p)) % vocab for i, p in enumerate(tree)]
    target = torch.tensor([[data.draw(st.integers(0, vocab - 1)) for _ in tree]])
    u = torch.tensor([draw_uniforms(data, len(tree) + 1)], dtype=torch.float64)
    u[u < 0.1] = math.nextafter(1, 0)
    laws = torch.nn.functional.one_hot(target, vocab).float()
    call = int32(*tree)[None], torch.tensor([tokens])
    got = ops.verify_rejection(*call, None if siblings == "deterministic" else draft, laws, u, siblings=siblings)
    assert equal(got, ops.verify_greedy(*call, target))
    assert equal(ops.verify_typical(*call, laws), got)


def test_generator():
    """Uniforms that are not given come from the generator: the same ones again, and others for another seed."""
    call = int32(*range(-1, 5))[None], torch.zeros(50, 6, dtype=torch.int64), None, torch.full((50, 6, 4), 0.25)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (ops.verify_rejection(*call, siblings="deterministic", generator=g) for g in seeds)
    assert equal(first, again) and not equal(first, other)
    assert ops.verify_rejection(*call, siblings="deterministic").count.max() > 1


def test_draft_probs_and_siblings_go_together():
    laws = torch.ones(1, 1, 2)
    with pytest.raises(RuntimeError, match="verify_rejection: draft_probs: expected none for siblings = deterministic"):
        ops.verify_rejection(int32(-1)[None], torch.zeros(1, 1).long(), laws, laws, siblings="deterministic")
    with pytest.raises(RuntimeError, match=r"verify_greedy: parents: expected shape \[3 or 1, T\], got \[2, 1\]"):
        ops.verify_greedy(int32(-1, -1).view(2, 1), *torch.zeros(2, 3, 1).long())
