"""Rotary embeddings whose angles depend on the length: across the border, speculation says what plain decoding says."""

from __future__ import annotations

import pytest
from effops.decoding import Drafter, generate
from effops.models import Llama
from strategies.drafting import Mixture, check_lossless, config

BORDER = 24
KINDS = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    "longrope": {
        "max_position_embeddings": 96,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": BORDER,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 8.0],
        },
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    fields = {"max_position_embeddings": BORDER, **KINDS[request.param]}
    return Llama.random(config(**fields), seed=2, std=0.5)


class Recorder(Mixture):
    """Notes the lengths at which it was asked."""

    def propose(self, context):
        self.asked.append(max(map(len, context.tokens)))
        return super().propose(context)


def run(model, prompts, count, nodes):
    plain = generate(model, prompts, max_new_tokens=count, return_logits=True)
    drafter = Recorder(prompts, plain.tokens, nodes=nodes, truth=0.9, absent=0.0)
    drafter.asked = []
    got = check_lossless(model, prompts, drafter, plain=plain, max_new_tokens=count)
    return got, drafter.asked


@pytest.mark.parametrize("start", [1, 9, BORDER - 2, BORDER - 1, BORDER, BORDER + 1])
@pytest.mark.parametrize("nodes", [2, 7])
def test_across_the_border(model, start, nodes):
    got, asked = run(model, [[5 + i % 7 for i in range(start)]], 90 - start, nodes)
    kind = model.rotary.parameters["rope_type"]
    if kind == "yarn":
        assert len(asked) >= got.stats.steps - 1
    elif start < 10:
        assert min(asked) <= BORDER - nodes + 1
    if kind == "dynamic":
        assert all(length <= BORDER for length in asked)  # every length beyond has angles of its own
    elif start > BORDER:
        assert got.stats.mean_accepted_length > 1.2


def test_a_batch_on_one_side(model):
    run(model, [[5, 6, 7], [9] * 8, [11]], 9, 6)
    run(model, [[5] * (BORDER + 1), [9] * (BORDER + 5)], 20, 6)


def test_a_sequence_that_has_ended_beyond_the_border_no_longer_counts(model):
    """The first one ends beyond it while the second one is short. Sequences beside each other share angles; from there
    on the second one's are those of its own length, with a drafter or without."""
    prompts = [[5 + i % 7 for i in range(BORDER - 3)], [9, 3]]
    free = generate(model, prompts, max_new_tokens=30).tokens
    stop = [next(t for t in free[0][5:] if t not in free[0][:5] and t not in free[1][:12])]
    plain = generate(model, prompts, max_new_tokens=18, stop=stop, return_logits=True)
    assert len(plain.tokens[0]) > 5
    drafter = Mixture(prompts, plain.tokens, nodes=6, truth=1.0, absent=0.0)
    got = check_lossless(model, prompts, drafter, plain=plain, max_new_tokens=18, stop=stop)
    assert got.stats.draft_nodes > 0


def test_no_draft_is_asked_for_where_none_can_be_verified():
    """Beyond the border of dynamic scaling."""
    model = Llama.random(config(max_position_embeddings=BORDER, **KINDS["dynamic"]), seed=2, std=0.5)

    class Never(Drafter):
        def propose(self, context):
            raise AssertionError(context.tokens)

    assert generate(model, [1] * (BORDER + 1), max_new_tokens=5, drafter=Never()).stats.steps == 4
