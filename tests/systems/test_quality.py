"""The measures themselves: losses are those of one pass over the text, a cache that sees less is told apart, and each
baseline sees what it says."""

from __future__ import annotations

import math

import pytest
import torch
from effops import reference
from effops.cache import calibrate_channels
from effops.models import Llama
from effops.systems.baselines import RecentKVCache
from effops.systems.cost import bytes_read
from effops.systems.induction import induction_model
from effops.systems.quality import Measured, continuation_losses, recall_accuracy
from effops.systems.texts import Recall, recall_of_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies.values import normal
from tiny import TINY


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def exact() -> Llama:
    return Llama.random(TINY, std=0.2, dtype=torch.float64)


@settings(max_examples=10)
@given(
    count=st.integers(1, 5),
    prompt=st.integers(1, 20),
    scored=st.integers(1, 6),
    batch=st.integers(1, 4),
    own=st.booleans(),
)
def test_losses_are_those_of_one_pass(exact, count, prompt, scored, batch, own):
    """Of the tokens after the first of the continuation, text by text, whatever the batches."""
    text = tokens(count, prompt + scored + 1)
    got = continuation_losses(exact, {"full": exact.new_cache}, text, prompt, batch=batch, own_prompt=own)["full"]
    with torch.inference_mode():
        logits = exact(text)[:, prompt:-1].log_softmax(-1)
    expected = -logits.gather(2, text[:, prompt + 1 :, None])[..., 0].mean(1)
    # Logits pass through float32 on their way to the sum.
    assert torch.allclose(torch.tensor(got.losses, dtype=torch.float64), expected, rtol=1e-5)
    assert len(got.seconds) == scored * -(-count // batch) and got.loss == pytest.approx(float(expected.mean()), 1e-5)


def test_a_copied_prompt_is_the_models_own():
    model = Llama.random(TINY, std=0.2)
    channels, text = calibrate_channels(model, [tokens(1, 60, seed=1)]), tokens(3, 100)
    labels = {"channels": channels, "budget": 24, "num_channels": 4, "dense_layers": 1}
    caches = {
        "labels": lambda b, c: model.new_labelled_cache(b, c, **labels),
        "recent": lambda b, c: RecentKVCache.of(model, b, c, budget=24, dense_layers=1),
        "full": model.new_cache,
    }  # fmt: skip
    copied, own = (continuation_losses(model, caches, text, 90, own_prompt=x) for x in (False, True))
    for name in caches:
        assert copied[name].losses == pytest.approx(own[name].losses, abs=1e-5), name
        assert copied[name].nbytes == caches[name](3, 100).nbytes
    assert min(abs(copied[n].loss - copied["full"].loss) for n in ("labels", "recent")) > 1e-3


def test_recent_tokens_are_what_a_step_sees(exact):
    cache = RecentKVCache.of(exact, 2, 40, budget=9, num_sinks=3, dense_layers=1)
    k, v, q = (normal(2, 31, heads, 16, dtype=torch.float64, seed=heads) for heads in (2, 2, 4))
    for i, layer in enumerate(cache.layers):
        step = cache.plan(30)
        layer.append(k[:, :30], v[:, :30], step)
        prompt = layer.attend(q[:, :30], step)
        assert torch.allclose(prompt, reference.attention(q[:, :30], k[:, :30], v[:, :30], causal=True))
        cache.advance(step)
        step = cache.plan(1)
        layer.append(k[:, 30:], v[:, 30:], step)
        seen = torch.arange(31) if i < 1 else torch.tensor([0, 1, 2, *range(25, 31)])
        expected = reference.attention(q[:, 30:], k[:, seen], v[:, seen])
        assert torch.allclose(layer.attend(q[:, 30:], step, window=None), expected), i
        cache.reset()


def test_recent_tokens_of_a_large_budget_are_the_full_cache(exact):
    caches = {"full": exact.new_cache, "recent": lambda b, c: RecentKVCache.of(exact, b, c, budget=60, dense_layers=0)}
    found = continuation_losses(exact, caches, tokens(2, 60), 40)
    assert found["recent"].losses == pytest.approx(found["full"].losses, abs=1e-9)
    with pytest.raises(ValueError, match="RecentKVCache: budget: expected more than num_sinks = 4, got 4"):
        RecentKVCache.of(exact, 1, 8, budget=4)


def test_paired_differences():
    a, b = (normal(7, dtype=torch.float64, seed=i) for i in (1, 2))
    mean, error = Measured(a.tolist()).above(Measured(b.tolist()))
    assert mean == pytest.approx(float((a - b).mean())) and error == pytest.approx(float((a - b).std()) / math.sqrt(7))
    mean, error = Measured([3.0]).above(Measured([1.0]))
    assert mean == 2 and math.isnan(error)


@pytest.mark.parametrize("count, prompt", [(0, 5), (1, 0), (1, 9)])
def test_nothing_to_score(exact, count, prompt):
    with pytest.raises(ValueError, match=r"continuation_losses: texts: expected one or more of prompt \+ 2"):
        continuation_losses(exact, {"full": exact.new_cache}, tokens(count, 10), prompt)


@settings(max_examples=15)
@given(context=st.integers(4, 400), place=st.data(), seed=st.integers(0, 99))
def test_an_induction_head_says_what_came_next(context, place, seed):
    model = induction_model(64)
    row = torch.randint(0, 63, (1, context), generator=torch.Generator().manual_seed(seed))
    at = place.draw(st.integers(1, context - 3))
    row[0, at] = row[0, -1] = 63
    with torch.inference_mode():
        assert model(row, model.new_cache(1, context), logits_to_keep=1)[0, -1].argmax() == row[0, at + 1]


def test_recall_is_lost_with_what_a_step_does_not_see():
    model = induction_model(256)
    task = recall_of_tokens(256, 16, 320)
    where = torch.tensor([row.index(row[-1]) for row in task.prompts.tolist()])
    assert recall_accuracy(model, model.new_cache, task, batch=5) == 1
    for budget in (40, 164, 330):
        # The first answer token's key is the one behind the asked-for one; all later ones are nearer to their queries.
        near = where + 1 > 319 - (budget - 4)
        got = recall_accuracy(
            model, lambda b, c, n=budget: RecentKVCache.of(model, b, c, budget=n, dense_layers=0), task
        )
        assert got == pytest.approx(float(near.float().mean()), abs=1 / 16), budget


def test_one_wrong_token_is_a_wrong_answer():
    model = induction_model(256)
    task = recall_of_tokens(256, 8, 100)
    answers = task.answers.clone()
    answers[3, -1] += 1
    answers[5, 0] += 1
    assert recall_accuracy(model, model.new_cache, Recall(task.prompts, answers)) == 6 / 8


def test_bytes_of_a_step():
    model = Llama.random(TINY)  # 3 layers, 2 KV heads of 16 channels, float32
    row = 2 * 16 * 4
    assert bytes_read(model, 100) == bytes_read(model, 100, budget=100, label_bits=16) == 3 * 2 * 100 * row
    assert bytes_read(model, 100, budget=24, dense_layers=1) == 2 * (100 + 2 * 24) * row
    assert bytes_read(model, 100, budget=24, label_bits=16, dense_layers=1) == 2 * ((100 + 2 * 24) * row + 2 * 200)
