"""Copied drafts: the matcher against brute-force search, block sizes, tokens a step by repetition."""

from __future__ import annotations

import random

import pytest
from effops.decoding import CopyDrafter, DraftContext, Sampler, SuffixMatcher, generate
from hypothesis import given
from hypothesis import strategies as st
from strategies.drafting import PROMPTS, check_lossless, random_model

POLICIES = ("first", "last", "longest")


@pytest.fixture(scope="module")
def model():
    return random_model("window-qk-norm")


def brute_force(tokens: list[int], gamma: int, policy: str) -> int | None:
    """Compares the last gamma tokens with those before every earlier place."""
    places = [end for end in range(gamma, len(tokens)) if tokens[end - gamma : end] == tokens[-gamma:]]
    if not places:
        return None
    if policy == "first":
        return places[0]

    def agreement(place: int) -> int:
        count = 0
        while count < min(place, 64) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return max(count, gamma)

    if policy == "longest":
        return max(places[-SuffixMatcher.CANDIDATES :], key=lambda place: (agreement(place), place))
    return places[-1]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=120),
    st.integers(1, 5),
    st.sampled_from(POLICIES),
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
)
def test_matcher_is_brute_force_search(tokens, gamma, policy, growth):
    """At every length of a sequence that grows by any number of tokens between the calls."""
    matcher, length = SuffixMatcher(gamma, policy), 0
    for more in growth:
        length = min(len(tokens), length + more)
        known = tokens[:length]
        place = matcher.match(known)
        assert place == brute_force(known, gamma, policy)
        assert place == matcher.match(known)  # asking again changes nothing
        if place is not None:
            assert gamma <= place < length and known[place - gamma : place] == known[-gamma:]


@pytest.mark.parametrize("policy", POLICIES)
def test_more_places_than_candidates(policy):
    tokens = [0] * 200
    assert SuffixMatcher(2, policy).match(tokens) == brute_force(tokens, 2, policy)
    tokens = random.Random(0).choices(range(2), k=400)
    assert SuffixMatcher(3, policy).match(tokens) == brute_force(tokens, 3, policy)


def test_the_policies_differ():
    tokens = [9, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2, 7, 8, 1, 2]
    assert [SuffixMatcher(2, policy).match(tokens) for policy in POLICIES] == [3, 11, 7]


def propose(drafter: CopyDrafter, tokens: list[int], budget: int = 99) -> list[int]:
    (draft,) = drafter.propose(DraftContext([tokens], [budget], None, Sampler.greedy()))
    return [] if draft is None else list(draft.tokens)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 4), st.integers(0, 9), st.integers(0, 6),
    st.sampled_from(POLICIES), st.booleans(),
)  # fmt: skip
def test_copies_what_is_there(tokens, gamma, block, budget, policy, adapt):
    """Never past the end, the block or the budget."""
    drafter = CopyDrafter(gamma, block, policy, adapt=adapt)
    drafter.begin(None, 1)
    place = brute_force(tokens, gamma, policy)
    expected = [] if place is None else tokens[place : place + min(block, budget)]
    assert propose(drafter, tokens, budget) == expected


def test_blocks_shrink_and_grow():
    """After a copy that was right by n tokens the next one has n + 1 of them, 3 at least; after a right one twice."""
    period = list(range(300))
    tokens = period + period[:3]
    drafter = CopyDrafter(3, 16, "first")
    drafter.begin(None, 1)
    sizes = []
    for right in (16, 5, 6, 2, 0, 3, 6, 12, 16, 16, 0):
        copied = propose(drafter, tokens)
        sizes.append(len(copied))
        right = min(right, len(copied))
        tokens = tokens + copied[:right]
        if right < len(copied):  # the model says something else, then returns to the text
            tokens = [*tokens, 777, *tokens[-3:]]
    assert sizes == [16, 16, 6, 12, 3, 3, 6, 12, 16, 16, 16]
    fixed = CopyDrafter(3, 16, "first", adapt=False)
    fixed.begin(None, 1)
    assert len(propose(fixed, period + period[:3])) == 16
    assert len(propose(fixed, [*period, *period[:3], 777, *period[:3]])) == 16


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gamma, block, adapt", [(1, 15, True), (2, 4, False), (1, 1, True)])
def test_lossless(model, policy, gamma, block, adapt):
    prompts = [ids * 3 for ids in PROMPTS]
    got = check_lossless(model, prompts, CopyDrafter(gamma, block, policy, adapt=adapt), max_new_tokens=40)
    assert got.stats.draft_nodes > 0


def test_a_block_of_0_is_plain_decoding(model):
    stats = check_lossless(model, PROMPTS, CopyDrafter(block=0), max_new_tokens=20).stats
    assert (stats.draft_nodes, stats.mean_accepted_length, stats.steps) == (0, 1.0, 19)


class Periodic:
    """A model's stand-in: says a text in which a share of the tokens repeats what was said one period before."""

    def __init__(self, share: float) -> None:
        draw = random.Random(1)
        self.text = [draw.randrange(1000) for _ in range(30)]
        while len(self.text) < 600:
            self.text.append(self.text[-30] if draw.random() < share else draw.randrange(1000))

    def tokens_a_step(self) -> float:
        drafter, at, steps = CopyDrafter(2, 15), 30, 0
        drafter.begin(None, 1)
        while at < len(self.text):
            copied, steps = propose(drafter, self.text[:at]), steps + 1
            right = 0
            while right < len(copied) and at + right < len(self.text) and copied[right] == self.text[at + right]:
                right += 1
            at += right + 1
        return 570 / steps


def test_tokens_a_step_grow_with_repetition():
    lengths = [Periodic(share).tokens_a_step() for share in (0.0, 0.8, 0.95, 1.0)]
    assert lengths == sorted(lengths) and lengths[0] == 1.0 and lengths[1] > 1.3 and lengths[-1] > 13


def test_a_model_in_a_loop_is_copied():
    """Greedy decoding of a random model with a short window falls into a loop, which copies follow."""
    model = random_model("windows", vocab_size=8)
    prompt = [1, 2, 3] * 2
    free = generate(model, prompt, max_new_tokens=57).tokens[0]
    got = check_lossless(model, [prompt], CopyDrafter(3), max_new_tokens=57)
    repeats = sum(brute_force(free[:n], 3, "last") is not None for n in range(3, 57))
    assert got.stats.mean_accepted_length > (1.5 if repeats > 40 else 1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SuffixMatcher(0), "SuffixMatcher: gamma: expected at least 1, got 0"),
        (lambda: SuffixMatcher(3, "best"), "SuffixMatcher: policy: expected 'first', 'last' or 'longest', got 'best'"),
        (lambda: CopyDrafter(0), "SuffixMatcher: gamma: expected at least 1, got 0"),
        (lambda: CopyDrafter(policy="best"), "SuffixMatcher: policy: expected 'first', 'last' or 'longest'"),
        (lambda: CopyDrafter(block=-1), "CopyDrafter: block: expected 0 or more, got -1"),
    ],
)
def test_what_copying_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
