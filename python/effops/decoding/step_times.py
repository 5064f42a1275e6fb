"""How long one step takes on this machine, by the number of nodes it verifies: what the best tree depends on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from effops.decoding.draft import DraftContext, Drafter
from effops.decoding.sampler import Sampler
from effops.decoding.speculation import Proposal, Speculator, verify
from effops.models import Llama

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@torch.inference_mode()
def step_times(
    model: Llama,
    sizes: Sequence[int] = SIZES,
    *,
    drafter: Drafter | None = None,
    context: int = 512,
    batch_size: int = 1,
    repeat: int = 5,
) -> dict[int, float]:
    """Median seconds of a greedy step over ``size`` nodes a sequence, after ``context`` tokens: forward pass,
    verification and commit, and ``drafter``'s proposal where one is given. Size 1 is a plain step.

    Sizes take turns of ``repeat`` steps after two that warm up, three times over, so that a change of the machine's
    speed meets all of them. For ``TokenTree.optimal``.
    """
    if not 1 <= context <= model.config.context_length - max(sizes):
        raise ValueError(
            f"step_times: context: expected 1 to {model.config.context_length - max(sizes)} beside trees of "
            f"{max(sizes)} nodes, got {context}"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch_size, context), generator=generator)
    cache = model.new_cache(batch_size, context + max(sizes))
    hidden = model.hidden_states(tokens, cache, keep=1)[:, -1]
    known = tokens.tolist()
    guesses = known[0] * -(-max(sizes) // context)
    speculator, greedy = Speculator(model.config.vocab_size, max(sizes)), Sampler.greedy()
    drafting = _drafting(model, drafter, DraftContext(known, [max(sizes)] * batch_size, hidden, greedy))

    def step(size: int) -> None:
        if size > 1:
            drafting()
        nodes = guesses[:size]
        batch = speculator.batch([Proposal(nodes, speculator.chain(size)) for _ in known])
        drawn = torch.tensor([[row[-1]] for row in known]) if batch is None else batch.tokens
        tree = None if batch is None else batch.nodes
        logits = model.step(drawn, cache, tree=tree)[1]
        if batch is None:
            greedy(logits[:, -1]).tolist()
        else:
            cache.commit(verify(batch, logits, greedy))
        cache.rollback([context] * batch_size)

    times: dict[int, list[float]] = {size: [] for size in sizes}
    with model.pinned():
        for size in [*sizes] * 3:
            for turn in range(repeat + 2):
                begin = time.perf_counter()
                step(size)
                if turn >= 2:
                    times[size].append(time.perf_counter() - begin)
    return {size: statistics.median(taken) for size, taken in times.items()}


def _drafting(model: Llama, drafter: Drafter | None, context: DraftContext) -> Callable[[], object]:
    if drafter is None:
        return lambda: None
    drafter.begin(model, len(context.tokens))
    return lambda: drafter.propose(context)
