"""How well drafters guess where a file says what comes next, rather than the model's own, often repetitive, text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effops.decoding import Draft, DraftContext, Drafter, Sampler
from effops.decoding.speculation import Proposal, Speculator, verify
from effops.models import Llama


@dataclass
class Forced:
    """Tokens a step emits from prefixes of the true text, the model's own next token included (plain: 1).

    ``model_decides``: the mean, over every ``EVERY``-th prefix, of the step that decoding would make there; the model
    verifies. ``text_decides``: a walk along the text, whose own tokens are roots and verdicts.
    """

    model_decides: float
    text_decides: float


EVERY = 4


@torch.inference_mode()
def teacher_forced(model: Llama, drafter: Drafter, tokens: Sequence[int], start: int, count: int) -> Forced:
    """Over ``count`` tokens from ``start`` on."""
    text = list(tokens[: start + count])
    hidden = model.hidden_states(torch.tensor([text]))[0]
    best = model.logits(hidden).argmax(-1).tolist()
    speculator = Speculator(model.config.vocab_size, drafter.max_nodes)
    greedy = Sampler.greedy()

    def proposal(known: list[int], at: int, budget: int) -> Proposal:
        draft = drafter.propose(DraftContext([known], [budget], hidden[at][None], greedy))[0]
        assert draft is None or isinstance(draft, Draft)
        return speculator.proposal(draft, known[-1], budget, drafter.max_nodes)

    drafter.begin(model, 1)
    at, steps = start, 0
    while at < len(text) - 1:
        guess = proposal(text[: at + 1], at - 1, len(text) - 1 - at)
        at += 1 + len(_matching(guess, text[at + 1 :]))
        steps += 1
    walked = (at - start) / steps

    cache = model.new_cache(1, len(text) + drafter.max_nodes)
    model.forward(torch.tensor([text]), cache, logits_to_keep=1)
    emitted = []
    for end in reversed(range(start, len(text) - 1, EVERY)):  # longest first: what a step writes no later one reads
        drafter.begin(model, 1)
        batch = speculator.batch([proposal([*text[:end], best[end - 1]], end - 1, count)])
        if batch is None:
            emitted.append(1)
            continue
        cache.rollback([end])
        logits = model.forward(batch.tokens, cache, tree=batch.nodes)
        emitted.append(int(verify(batch, logits, greedy).count))
    return Forced(sum(emitted) / len(emitted), walked)


def _matching(guess: Proposal, following: Sequence[int]) -> list[int]:
    """The nodes below the root whose tokens are those that follow."""
    path = [0]
    for token in following:
        below = (i for i, parent in enumerate(guess.shape.parents) if parent == path[-1] and guess.tokens[i] == token)
        node = next(below, None)
        if node is None:
            break
        path.append(node)
    return path[1:]
