"""Speculative greedy decoding is plain decoding: random trees, batches, caches, and every way to end."""

from __future__ import annotations

import pytest
import torch
from effops.decoding import Draft, TokenTree, generate
from strategies.drafting import MODELS, PROMPTS, Always, Mixture, check_lossless, random_model, words


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def grouped():
    return random_model()


def mixture(model, prompts, count, **options):
    """A drafter that knows the plain output, and that output."""
    plain = generate(model, prompts, max_new_tokens=count, return_logits=True)
    return Mixture(prompts, plain.tokens, **options), plain


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_random_trees(model, batch):
    prompts = PROMPTS[:batch]
    for seed, truth in enumerate((0.3, 0.8, 0.97)):
        drafter, plain = mixture(model, prompts, 40, nodes=3 + 5 * seed, truth=truth, seed=seed)
        got = check_lossless(model, prompts, drafter, plain=plain, max_new_tokens=40)
        assert got.stats.draft_nodes > 0
    assert got.stats.mean_accepted_length > 2  # noise alone would show nothing


def test_every_accepted_length_occurs(grouped):
    """The trees of the test above reach all lengths up to the depth they have, and so do the ends of paths."""
    drafter, _ = mixture(grouped, PROMPTS, 56, nodes=7, truth=0.85, absent=0.2)
    stats = check_lossless(grouped, PROMPTS, drafter, max_new_tokens=56).stats
    assert set(stats.accepted_lengths) >= {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("page", [1, 3, 16])
def test_paged_caches_grow(model, page):
    drafter, _ = mixture(model, PROMPTS[:3], 30, seed=page)
    check_lossless(
        model, PROMPTS[:3], drafter, max_new_tokens=30, cache=lambda: model.new_paged_cache(3, 200 // page, page)
    )


@pytest.mark.parametrize("spare", [0, 1, 4])
def test_tight_capacity(model, spare):
    """The longest sequence fits to the token: trees shrink, and the last steps are plain ones."""
    drafter, _ = mixture(model, PROMPTS[:3], 20, truth=0.9)
    got = check_lossless(
        model, PROMPTS[:3], drafter, max_new_tokens=20, cache=lambda: model.new_cache(3, 7 + 20 - 1 + spare)
    )
    assert got.stats.draft_nodes > 0


def test_pages_run_out_for_trees_but_not_for_plain_steps(grouped):
    """Pages for what plain decoding holds, and no more: no tree that needs another one finds it."""
    prompts = PROMPTS[:2]
    needed = sum(-(-(len(ids) + 20 - 1) // 2) for ids in prompts)
    drafter, _ = mixture(grouped, prompts, 20, truth=0.9, absent=0.0)
    got = check_lossless(
        grouped, prompts, drafter, max_new_tokens=20, cache=lambda: grouped.new_paged_cache(2, needed, 2)
    )
    assert got.stats.draft_nodes > 0 and got.stats.accepted_lengths[1] > 0


def test_continues_what_a_cache_holds(model):
    whole = generate(model, PROMPTS[0], max_new_tokens=30).tokens[0]
    for cache in (model.new_cache(1, 64), model.new_paged_cache(1, 22, 3)):
        first = generate(model, PROMPTS[0], max_new_tokens=11, cache=cache, drafter=Mixture([PROMPTS[0]], [whole]))
        assert cache.lengths == [5 + 10]
        rest = Mixture([first.tokens[0][-1:]], [whole[11:]], seed=1)
        second = generate(model, first.tokens[0][-1:], max_new_tokens=19, cache=cache, drafter=rest)
        assert first.tokens[0] + second.tokens[0] == whole and second.stats.mean_accepted_length > 1.2


def right_chain(prompt, output, length=12):
    """Always right, so that whatever ends a sequence lies inside an accepted path."""
    whole = [*prompt, *output]
    return Always(lambda tokens, budget: Draft(whole[len(tokens) : len(tokens) + length]))


@pytest.mark.parametrize("place", range(1, 14))
def test_a_stop_token_inside_a_path(grouped, place):
    prompt = PROMPTS[0]
    output = generate(grouped, prompt, max_new_tokens=20).tokens[0]
    got = check_lossless(
        grouped, [prompt], right_chain(prompt, output), max_new_tokens=20, stop=[output[place]],
        cache=lambda: grouped.new_cache(1, 40),
    )  # fmt: skip
    first = output.index(output[place])
    assert got.tokens == [output[: first + 1]] and got.reasons == ["stop"] and got.stats.steps <= 2


def test_end_of_text_inside_a_path():
    model = random_model()
    prompts = PROMPTS[:3]
    drafter, plain = mixture(model, prompts, 30, truth=1.0, absent=0.0)
    model.config.eos_token_ids = (plain.tokens[1][9], plain.tokens[0][4])
    got = check_lossless(model, prompts, drafter, max_new_tokens=30, cache=lambda: model.new_paged_cache(3, 80, 2))
    assert got.reasons[0] == got.reasons[1] == "stop"
    check_lossless(model, prompts, drafter, max_new_tokens=30, ignore_eos=True)


def test_stop_strings_inside_a_path(grouped):
    pytest.importorskip("tokenizers", reason="text in and out needs the tokenizers library")
    tokenizer, prompts = words(), PROMPTS[:2]
    free = generate(grouped, prompts, max_new_tokens=24, tokenizer=tokenizer)
    for begin in (5, 12, 19):
        stop = free.texts[0][begin : begin + 3]  # begins and ends inside tokens
        for truth in (0.6, 1.0):
            got = check_lossless(
                grouped, prompts, Mixture(prompts, free.tokens, truth=truth, absent=0.0), max_new_tokens=24,
                tokenizer=tokenizer, stop=[stop, "never"], cache=lambda: grouped.new_cache(2, 60),
            )  # fmt: skip
            assert got.reasons[0] == "stop" and got.texts[0] == free.texts[0][: free.texts[0].index(stop)]


@pytest.mark.parametrize("count", range(1, 16))
def test_the_limit_inside_a_path(grouped, count):
    prompt = PROMPTS[0]
    output = generate(grouped, prompt, max_new_tokens=20).tokens[0]
    got = check_lossless(
        grouped, [prompt], right_chain(prompt, output, 6), max_new_tokens=count, cache=lambda: grouped.new_cache(1, 40)
    )
    assert got.tokens == [output[:count]] and got.stats.steps == -(-(count - 1) // 7)


def test_the_context_ends_it(model):
    prompts = [[5] * 40, [6, 7] * 25]
    drafter, plain = mixture(model, prompts, 99, truth=0.95)
    got = check_lossless(model, prompts, drafter, plain=plain, max_new_tokens=99)
    assert got.reasons == ["context"] * 2 and [len(t) for t in got.tokens] == [25, 15]


def test_the_deepest_accepted_path_and_the_largest_tree(grouped):
    """A tree of 1024 nodes, most of which are noise."""
    prompt = PROMPTS[0]
    output = generate(grouped, prompt, max_new_tokens=30).tokens[0]
    whole = [*prompt, *output]

    def draft(tokens, budget):
        path = whole[len(tokens) : len(tokens) + 15]
        parents = list(range(-1, len(path))) + [i % (len(path) + 1) for i in range(1023 - len(path))]
        return Draft([*path, *([63] * (1023 - len(path)))], TokenTree(parents))

    got = check_lossless(grouped, [prompt], Always(draft, 1024), max_new_tokens=30)
    assert got.stats.steps == 2 and got.stats.draft_nodes > 1023


def test_one_drafter_serves_many_calls(grouped):
    drafter, plain = mixture(grouped, PROMPTS, 20)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for _ in range(2):
        check_lossless(grouped, PROMPTS, drafter, plain=plain, max_new_tokens=20)
    assert torch.equal(torch.get_rng_state(), state)  # greedy decoding draws nothing
