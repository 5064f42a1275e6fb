"""The drafters that come with effops: what they propose, what they keep between steps, what they refuse."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from effops.decoding import DraftContext, MedusaDrafter, MedusaHeads, ModelDrafter, Sampler, TokenTree, generate
from effops.models import Llama
from strategies.drafting import PROMPTS, VOCAB, check_lossless, config, random_model

GREEDY = Sampler.greedy()


@pytest.fixture(scope="module")
def model():
    return random_model("window-qk-norm")


@pytest.fixture(scope="module")
def small():
    return Llama.random(config(num_hidden_layers=1, hidden_size=16), seed=9, std=0.5)


def context(tokens, budgets, hidden=None, sampler=GREEDY):
    return DraftContext(tokens, budgets, hidden, sampler)


# ModelDrafter


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("length", [1, 4])
def test_a_draft_model_is_lossless(model, small, batch, length):
    got = check_lossless(model, PROMPTS[:batch], ModelDrafter(small, length), max_new_tokens=30)
    assert got.stats.draft_nodes > 0


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_target_as_its_own_draft_model(model, length):
    """Everything is accepted; only the end of a sequence shortens a step."""
    whole = 3 * (length + 1)
    stats = check_lossless(model, PROMPTS[:1], ModelDrafter(model, length), max_new_tokens=1 + whole).stats
    assert stats.accepted_lengths == {length + 1: 3} and stats.mean_accepted_length == length + 1
    stats = check_lossless(model, PROMPTS, ModelDrafter(model, length), max_new_tokens=3 + whole).stats
    assert stats.accepted_lengths == Counter([length + 1] * 12 + [2] * 4)


def test_the_draft_models_cache_follows_what_was_accepted(small):
    """Whatever the target says, the next proposal is what the draft model says of the whole sequence."""
    drafter, generator = ModelDrafter(small, 3), torch.Generator().manual_seed(0)
    drafter.begin(small, 2)
    known = [[3, 1, 4], [7]]
    for step in range(10):
        drafts = drafter.propose(context(known, [9, 9]))
        for row, draft in enumerate(drafts):
            assert list(draft.tokens) == generate(small, known[row], max_new_tokens=3, ignore_eos=True).tokens[0]
            accepted = (step + 2 * row) % 4
            other = int(torch.randint(VOCAB, (), generator=generator))
            known[row] = [*known[row], *draft.tokens[:accepted], other]


@torch.no_grad()
def test_the_stated_law_is_the_draft_models(small):
    sampler = Sampler(1.3, top_k=9, generator=torch.Generator().manual_seed(0))
    drafter = ModelDrafter(small, 4)
    drafter.begin(small, 2)
    known = [[3, 1, 4], [7]]
    drafts = drafter.propose(context(known, [9, 2], sampler=sampler))
    assert [len(draft.tokens) for draft in drafts] == [4, 2]
    for tokens, draft in zip(known, drafts, strict=True):
        whole = torch.tensor([[*tokens, *draft.tokens]])
        laws = sampler.probabilities(small(whole)[0, len(tokens) - 1 : -1])
        torch.testing.assert_close(draft.probs, laws, rtol=1e-4, atol=1e-5)


def test_rows_that_have_ended_get_no_draft(model, small):
    plain = generate(model, PROMPTS, max_new_tokens=25).tokens
    stop = [plain[0][3], plain[2][9]]
    check_lossless(model, PROMPTS, ModelDrafter(small, 4), max_new_tokens=25, stop=stop)
    check_lossless(model, PROMPTS, ModelDrafter(model, 4), max_new_tokens=25, stop=stop)
    drafter = ModelDrafter(small, 4)
    drafter.begin(small, 3)
    drafts = drafter.propose(context([[1, 2], [3], [4]], [0, 2, 7]))
    assert drafts[0] is None and [len(draft.tokens) for draft in drafts[1:]] == [2, 4]
    assert drafter.propose(context([[1, 2], [3], [4]], [0, 0, 0])) == [None] * 3


def test_the_draft_models_context_may_be_shorter(model):
    short = Llama.random(config(max_position_embeddings=16), seed=9, std=0.5)
    got = check_lossless(model, PROMPTS, ModelDrafter(short, 4), max_new_tokens=40)
    assert got.stats.draft_nodes > 0
    prompts = [[5] * 30, [6]]  # the first is beyond it from the start
    assert check_lossless(model, prompts, ModelDrafter(short, 4), max_new_tokens=9).stats.draft_nodes > 0


def test_what_model_drafters_refuse(model):
    with pytest.raises(ValueError, match="ModelDrafter: length: expected at least 1, got 0"):
        ModelDrafter(model, 0)
    other = Llama.random(config(vocab_size=VOCAB + 1))
    message = f"ModelDrafter: model: expected the target's vocabulary of {VOCAB}, got {VOCAB + 1}"
    with pytest.raises(ValueError, match=message):
        generate(model, [1], max_new_tokens=2, drafter=ModelDrafter(other))


# MedusaDrafter


def heads(count=3, own=False, seed=0, **options):
    made = MedusaHeads(32, count, 1, VOCAB if own else None, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return made


TREE = TokenTree.from_paths([(0,), (0, 0), (0, 0, 0), (0, 2), (1,), (1, 0), (1, 0, 1), (3,), (1, 4)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_random_heads_are_lossless(model, batch, own, root):
    got = check_lossless(model, PROMPTS[:batch], MedusaDrafter(heads(own=own, root=root), TREE), max_new_tokens=30)
    assert got.stats.draft_nodes > 0


def test_heads_see_the_state_that_gave_the_last_token(model):
    """Fresh heads give the model's own logits of that state: their first choice is the last token. Across accepted
    paths, plain steps and rows of different pace."""
    seen = []

    class Spy(MedusaDrafter):
        def propose(self, context):
            choices = model.logits(context.hidden).argmax(-1).tolist()
            seen.append(len(context.tokens))
            for own, budget, choice in zip(context.tokens, context.budgets, choices, strict=True):
                assert budget == 0 or own[-1] == choice
            return [None if len(seen) % 3 == 0 else draft for draft in super().propose(context)]

    wide = TokenTree.full([16, 4])  # wide enough to be right now and then
    got = check_lossless(model, PROMPTS, Spy(heads(2), wide), max_new_tokens=40)
    assert len(seen) > 20 and len(got.stats.accepted_lengths) > 1


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_a_node_is_the_right_rank_of_the_right_head(model, projection):
    drafter, hidden = MedusaDrafter(heads(projection=projection), TREE), torch.randn(2, 32)
    drafter.begin(model, 2)
    order = drafter.heads(hidden, model.lm_head.weight).argsort(-1, descending=True)
    for budgets, depth in (([9, 9], 3), ([2, 2], 2), ([1, 0], 1), ([3, 1], 3)):
        drafts = drafter.propose(context([[1], [2]], budgets, hidden))
        cut = TREE.truncated(max_depth=depth)
        for row, draft in enumerate(drafts):
            if budgets[row] == 0:
                assert draft is None
                continue
            assert draft.tree == cut and draft.probs is None
            for token, d, rank in zip(draft.tokens, cut.depths[1:], cut.ranks[1:], strict=True):
                assert token == order[d - 1, row, rank]
    assert drafter.propose(context([[1], [2]], [0, 0], hidden)) == [None, None]


@torch.no_grad()
def test_heads_that_look_at_the_root_see_the_last_token(model):
    drafter, hidden = MedusaDrafter(heads(root=True), TREE), torch.randn(2, 32)
    drafter.begin(model, 2)
    root = model.embed_tokens.weight[[2, 5]]
    order = drafter.heads(hidden, model.lm_head.weight, root=root).argsort(-1, descending=True)
    for row, draft in enumerate(drafter.propose(context([[1, 2], [4, 5]], [9, 9], hidden))):
        assert draft.tokens[0] == order[0, row, 0]


@torch.no_grad()
def test_a_part_of_the_vocabulary_and_another_dtype(model):
    """Drafts stay within the tokens named, in the order of the heads' logits among them."""
    some = [3, 5, 8, 9, 11, 20, 33]
    drafter, hidden = MedusaDrafter(heads(), TREE, vocabulary=some), torch.randn(1, 32)
    drafter.begin(model, 1)
    order = drafter.heads(hidden, model.lm_head.weight)[:, :, some].argsort(-1, descending=True)
    draft = drafter.propose(context([[1]], [9], hidden))[0]
    for token, d, rank in zip(draft.tokens, TREE.depths[1:], TREE.ranks[1:], strict=True):
        assert token == some[order[d - 1, 0, rank]]
    short = heads().to(torch.bfloat16)
    got = check_lossless(model, PROMPTS[:2], MedusaDrafter(short, TREE, vocabulary=some), max_new_tokens=20)
    assert got.stats.draft_nodes > 0
    with pytest.raises(
        ValueError, match="MedusaDrafter: vocabulary: expected None for heads with LM heads of their own"
    ):
        MedusaDrafter(heads(own=True), TREE, vocabulary=some)


def test_the_default_tree_is_the_best_one_of_16_nodes():
    made = heads()
    made.acceptance = [[0.6, 0.2], [0.4, 0.1], [0.2, 0.1]]
    assert MedusaDrafter(made).tree == TokenTree.optimal(made.acceptance, {16: 1.0})


def test_what_medusa_drafters_refuse(model):
    for made, tree, message in (
        (heads(), None, "tree: expected one for heads without an acceptance table, got None"),
        (heads(2), TREE, "tree: expected a depth of at most 2 heads, got 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"MedusaDrafter: {message}")):
            MedusaDrafter(made, tree)
    narrow = MedusaDrafter(MedusaHeads(16, 3), TREE)
    with pytest.raises(ValueError, match="MedusaDrafter: heads: expected the target's width 32, got 16"):
        generate(model, [1], max_new_tokens=2, drafter=narrow)
