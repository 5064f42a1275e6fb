"""Drafts that are missing, nonsense or too much cost speed only; what is no draft at all is refused."""

from __future__ import annotations

import pytest
import torch
from effops.decoding import Draft, Drafter, Sampler, TokenTree, generate, step_times
from strategies.drafting import PROMPTS, VOCAB, Always, check_lossless, random_model

LAW = torch.full((3, VOCAB), 1 / VOCAB)
CHAIN = [1, 2, 3]

DRAFTS = {
    "none": lambda tokens, budget: None,
    "empty": lambda tokens, budget: Draft([]),
    "empty with a tree": lambda tokens, budget: Draft([], TokenTree.full([3, 2])),
    "empty with a law": lambda tokens, budget: Draft([], probs=LAW),
    "a root": lambda tokens, budget: Draft([], TokenTree.chain(1)),
    "tokens of a root": lambda tokens, budget: Draft(CHAIN, TokenTree.chain(1)),
    "negative": lambda tokens, budget: Draft([-1, 2, 3]),
    "out of range": lambda tokens, budget: Draft([1, VOCAB, 3]),
    "far out of range": lambda tokens, budget: Draft([10**30, -(10**30)]),
    "out of range in a tree": lambda tokens, budget: Draft([-5, 1, VOCAB, 2, 10**30, 3], TokenTree.full([2, 2])),
    "fewer tokens than nodes": lambda tokens, budget: Draft(CHAIN, TokenTree.full([2, 3])),
    "more tokens than nodes": lambda tokens, budget: Draft(CHAIN * 9, TokenTree.full([2, 3])),
    "equal siblings": lambda tokens, budget: Draft([7] * 6, TokenTree.full([2, 2])),
    "too long": lambda tokens, budget: Draft(range(10_000)),
    "the largest tree": lambda tokens, budget: Draft([9] * 1023, TokenTree.full([31, 32])),
    "the deepest tree": lambda tokens, budget: Draft([9] * 1023, TokenTree.chain(1024)),
    "a tensor": lambda tokens, budget: Draft(torch.tensor(CHAIN), TokenTree([-1, 0, 0, 1])),
    "by the budget": lambda tokens, budget: Draft([5] * (budget + 3)),
    "a law of other tokens": lambda tokens, budget: Draft(CHAIN, probs=torch.eye(VOCAB)[:3]),
    "a law too short": lambda tokens, budget: Draft([1, 2, 3, 4], probs=LAW),
    "a law too narrow": lambda tokens, budget: Draft(CHAIN, probs=LAW[:, :-1]),
    "a law with three dimensions": lambda tokens, budget: Draft(CHAIN, probs=LAW[None]),
    "a law of NaN": lambda tokens, budget: Draft(CHAIN, probs=LAW * torch.nan),
    "a law of infinity": lambda tokens, budget: Draft(CHAIN, probs=LAW / 0),
    "a law below zero": lambda tokens, budget: Draft(CHAIN, probs=2 * LAW - torch.eye(VOCAB)[:3].roll(9, 1)),
    "a law of zeros": lambda tokens, budget: Draft(CHAIN, probs=LAW * 0),
    "a law not normalised": lambda tokens, budget: Draft(CHAIN, probs=3 * LAW),
    "a law of integers": lambda tokens, budget: Draft(CHAIN, probs=torch.zeros(3, VOCAB, dtype=torch.int64)),
    "a law in float64": lambda tokens, budget: Draft(CHAIN, probs=LAW.double()),
    "a law with a gradient": lambda tokens, budget: Draft(CHAIN, probs=LAW.clone().requires_grad_()),
    "siblings of a tree cut short": lambda tokens, budget: Draft(
        [*range(12)], TokenTree.full([3, 3]), LAW[:1].expand(12, -1), "without_replacement"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model("window-qk-norm")


@pytest.fixture(scope="module")
def plain(model):
    return generate(model, PROMPTS[:2], max_new_tokens=6, return_logits=True)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("max_nodes", [-3, 0, 1, 2, 5, 64, 5000])
def test_costs_speed_only(model, plain, kind, max_nodes):
    check_lossless(model, PROMPTS[:2], Always(DRAFTS[kind], max_nodes), plain=plain, max_new_tokens=6)


@pytest.mark.parametrize("kind", DRAFTS)
def test_costs_speed_only_when_sampling(model, kind):
    """As many tokens as asked for, all of them likely enough to be drawn."""
    sampler = Sampler(temperature=0.7, top_k=3, generator=torch.Generator().manual_seed(0))
    drafter = Always(DRAFTS[kind], 16)
    got = generate(model, PROMPTS[:2], max_new_tokens=8, sampler=sampler, drafter=drafter, return_logits=True)
    assert [len(t) for t in got.tokens] == [8, 8] and got.reasons == ["length"] * 2
    for tokens, logits in zip(got.tokens, got.logits, strict=True):
        best = logits.topk(3).indices
        assert all(token in row for token, row in zip(tokens, best.tolist(), strict=True))


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 2), (3,), ()])
def test_some_rows_only(model, rows):
    plain = generate(model, PROMPTS, max_new_tokens=9)
    whole = {tuple(ids): [*ids, *new] for ids, new in zip(PROMPTS, plain.tokens, strict=True)}

    class Some(Drafter):
        def propose(self, context):
            drafts = [None] * 4
            for row in rows:
                tokens = context.tokens[row]
                drafts[row] = Draft(whole[tuple(PROMPTS[row])][len(tokens) :])
            return drafts

    got = check_lossless(model, PROMPTS, Some(), max_new_tokens=9)
    assert got.stats.sequence_steps == 8 * (4 - len(rows)) + len(rows)


@pytest.mark.parametrize(
    "answer",
    [[], [None], [None] * 3, [[1, 2], None], [Draft([1]), "draft"], None, 7, {0: None, 1: None}, iter([None, None])],
    ids=["nothing", "too few", "too many", "a list", "text", "None", "a number", "a dictionary", "an iterator"],
)
def test_what_is_no_draft_is_refused(model, answer):
    class Wrong(Drafter):
        def propose(self, context):
            return answer

    expected = "Wrong: propose: expected a Draft or None for each of 2 sequences, got"
    with pytest.raises(ValueError, match=expected):
        generate(model, PROMPTS[:2], max_new_tokens=4, drafter=Wrong())


def test_a_drafter_without_propose_is_none():
    with pytest.raises(TypeError, match="propose"):
        Drafter()


def test_budgets_are_what_can_be_used(model):
    """A draft one deeper would be cut; budgets of ended sequences are 0."""
    seen = []

    def draft(tokens, budget):
        seen.append((len(tokens), budget))
        return None

    generate(model, [PROMPTS[0], PROMPTS[0] * 12], max_new_tokens=7, drafter=Always(draft))
    assert seen[0::2] == [(6 + i, 5 - i) for i in range(5)]
    assert seen[1::2] == [(61, 3), (62, 2), (63, 1), (64, 0), (65, 0)]  # a context of 64


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("context", [1, 5, 40])
def test_step_times(batch_size, context):
    model = random_model()
    before = generate(model, PROMPTS[0], max_new_tokens=10).tokens
    drafter = Always(lambda tokens, budget: Draft(tokens[-2:]), 5)
    for guess in (None, drafter):
        times = step_times(model, (1, 2, 7, 16), drafter=guess, context=context, batch_size=batch_size, repeat=2)
        assert list(times) == [1, 2, 7, 16] and all(0 < seconds < 5 for seconds in times.values())
    assert TokenTree.optimal([[0.9], [0.9]], times).max_depth <= 2
    assert generate(model, PROMPTS[0], max_new_tokens=10).tokens == before


@pytest.mark.parametrize("context", [0, 49, 512])
def test_step_times_of_a_context_that_does_not_fit(context):
    expected = f"step_times: context: expected 1 to 48 beside trees of 16 nodes, got {context}"
    with pytest.raises(ValueError, match=expected):
        step_times(random_model(), (1, 16), context=context)
