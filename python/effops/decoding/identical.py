"""Whether two greedy runs of one model say the same, judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ERROR_LIMIT = 1e-3  # of the largest logit: more than this is no rounding


@dataclass
class Verdict:
    """``kind`` is 'identical', 'near-tie' or 'NO'.

    ``error`` is the sum of both runs' largest logit errors against float64 on the common prefix, ``position``
    the first different token, ``margin`` the float64 distance of the two best tokens there.
    """

    kind: str
    error: float
    largest_logit: float
    position: int | None = None
    margin: float | None = None


@torch.no_grad()
def exact_logits(model: Callable[[Tensor], Tensor], prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """float64 logits [n,V] before each of ``tokens``, by a float64 model, tokens [1,T] to logits [1,T,V]."""
    inputs = torch.tensor([[*prompt, *tokens[:-1]]], dtype=torch.int64)
    logits = model(inputs)[0, len(prompt) - 1 :]
    if logits.dtype != torch.float64:
        raise ValueError(f"exact_logits: model: expected float64 logits, got {logits.dtype}")
    return logits


def compare(
    prompt: Sequence[int],
    tokens_a: Sequence[int],
    logits_a: Tensor,
    tokens_b: Sequence[int],
    logits_b: Tensor,
    exact: Callable[[Tensor], Tensor],
) -> Verdict:
    """The verdict on two greedy float32 runs: tokens and the logits float32 [n,V] they were chosen from.

    ``exact`` is the same model in float64. A first difference is a near-tie if float64's margin there is at
    most twice the observed error; an error above 1e-3 of the largest logit is a 'NO' by itself.
    """
    for name, logits in (("logits_a", logits_a), ("logits_b", logits_b)):
        if logits.dtype != torch.float32:
            raise ValueError(f"compare: {name}: expected float32, got {logits.dtype}")
    shared = min(len(tokens_a), len(tokens_b))
    differs = next((i for i in range(shared) if tokens_a[i] != tokens_b[i]), None)
    judged = shared if differs is None else differs + 1
    truth = exact_logits(exact, prompt, tokens_a[:judged])
    error = sum(float((logits[:judged].double() - truth).abs().max()) for logits in (logits_a, logits_b))
    largest = float(truth.abs().max())

    verdict = Verdict("identical", error, largest)
    if differs is not None:
        best = truth[differs].topk(2).values
        verdict.position, verdict.margin = differs, float(best[0] - best[1])
        verdict.kind = "near-tie" if verdict.margin <= 2 * error else "NO"
    elif len(tokens_a) != len(tokens_b):
        verdict.position, verdict.kind = shared, "NO"
    if not error <= ERROR_LIMIT * largest:  # also when the error is NaN
        verdict.kind = "NO"
    return verdict
