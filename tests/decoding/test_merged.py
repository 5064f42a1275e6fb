"""``MergedDrafter``: lossless, equal beginnings share a path, bounds, laws left alone."""

from __future__ import annotations

import pytest
import torch
from effops.decoding import CopyDrafter, Draft, DraftContext, Drafter, MergedDrafter, ModelDrafter, Sampler, TokenTree
from effops.models import Llama
from hypothesis import given
from hypothesis import strategies as st
from strategies.drafting import PROMPTS, VOCAB, check_lossless, config, random_model


class Fixed(Drafter):
    """Says the same of every sequence."""

    def __init__(self, draft: Draft | None, max_nodes: int = 64, needs_hidden: bool = False) -> None:
        self.draft, self.max_nodes, self.needs_hidden = draft, max_nodes, needs_hidden

    def propose(self, context):
        return [self.draft] * len(context.tokens)


def merged(*drafts: Draft | None, max_nodes: int | None = None) -> Draft | None:
    drafter = MergedDrafter(*map(Fixed, drafts), max_nodes=max_nodes)
    return drafter.propose(DraftContext([[1]], [9], None, Sampler.greedy()))[0]


def paths(draft: Draft) -> set[tuple[int, ...]]:
    """What each node says from the root on."""
    tree = draft.tree or TokenTree.chain(len(draft.tokens) + 1)
    said = [()]
    for token, parent in zip(draft.tokens, tree.parents[1:], strict=False):
        said.append((*said[parent], token))
    return set(said[1:])


TREE = TokenTree([-1, 0, 0, 1, 2, 4])


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    tokens = draw(st.lists(st.integers(0, 2), max_size=5))
    parents = [-1, *(draw(st.integers(0, i)) for i in range(len(tokens)))]
    return Draft(tokens, draw(st.sampled_from((None, TokenTree(parents)))))


@given(st.lists(drafts(), min_size=2, max_size=4))
def test_says_what_each_says_and_nothing_twice(each):
    got = merged(*each)
    assert paths(got) == set().union(*map(paths, each))
    assert len(got.tokens) == len(paths(got)) == len(got.tree) - 1


@given(st.lists(drafts(), min_size=2, max_size=3), st.integers(2, 6))
def test_the_first_nodes_stay(each, most):
    whole, got = merged(*each), merged(*each, max_nodes=most)
    assert list(got.tokens) == list(whole.tokens)[: most - 1]
    assert got.tree.parents == whole.tree.parents[:most]


def test_shapes_that_come_again_are_the_same_object():
    drafter = MergedDrafter(Fixed(Draft([1, 2])), Fixed(Draft([1, 3, 4, 5, 6], TREE)))
    context = DraftContext([[1], [2]], [9, 9], None, Sampler.greedy())
    first, second = drafter.propose(context), drafter.propose(context)
    assert first[0].tree is first[1].tree is second[0].tree
    assert drafter.max_nodes == 127 and not drafter.needs_hidden
    assert MergedDrafter(Fixed(None, 5), Fixed(None, 3, True)).needs_hidden


def test_missing_drafts_and_laws():
    alone, law = Draft([4, 5]), Draft([4], probs=torch.full((1, VOCAB), 1 / VOCAB))
    assert merged(None, alone) is alone and merged(None, None) is None
    assert merged(alone, law) is law  # its law is not that of a merged tree
    assert paths(merged(alone, Draft([7, 8, 9, 9], TokenTree([-1, 0])))) == {(4,), (4, 5), (7,)}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="MergedDrafter: drafters: expected one or more, got none"):
        MergedDrafter()
    with pytest.raises(ValueError, match="MergedDrafter: max_nodes: expected at least 2, got 1"):
        MergedDrafter(CopyDrafter(), max_nodes=1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("most", [None, 4])
def test_is_lossless(batch, most):
    model = random_model("window-qk-norm")
    guesses = Fixed(Draft([3, 5, 3, 5, 1], TREE))
    drafter = MergedDrafter(guesses, CopyDrafter(gamma=1, block=4), max_nodes=most)
    got = check_lossless(model, PROMPTS[:batch], drafter, max_new_tokens=30)
    assert got.stats.draft_nodes > 0


def test_a_draft_model_among_them_is_used_alone():
    model = random_model("window-qk-norm")
    small = Llama.random(config(num_hidden_layers=1, hidden_size=16), seed=9, std=0.5)
    check_lossless(model, PROMPTS, MergedDrafter(CopyDrafter(), ModelDrafter(small, 3)), max_new_tokens=20)
