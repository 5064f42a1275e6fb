"""The filtered law of a next token, computed in float64, and the draw from it by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor


def sampling_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """softmax(logits / temperature) [...,V], then top-k, top-p, min-p, each followed by a renormalisation.

    The descending order is that of the logits, equal ones by id: top-k keeps its first k, top-p those before which
    less than ``top_p`` has come. min-p keeps what has at least ``min_p`` times the largest probability. Temperature 0
    puts everything on the first of equal maxima.
    """
    law = _law(logits, temperature, top_k, top_p, min_p)
    return law if logits.dtype == torch.float64 else law.float()


def sample(
    logits: Tensor,
    uniforms: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """int64 [...]: the first token whose probabilities, summed in id order, exceed its row's uniform [...]; at
    temperature 0 there may be none."""
    if uniforms is None:
        if temperature != 0:
            raise RuntimeError(f"sample: uniforms: expected a tensor at temperature {temperature}, got none")
        return logits.argmax(-1)
    law = _law(logits, temperature, top_k, top_p, min_p)
    sums = law.cumsum(-1)
    drawn = (sums <= uniforms.to(law)[..., None] * sums[..., -1:]).sum(-1)
    last = law.shape[-1] - 1 - (law.flip(-1) > 0).int().argmax(-1)  # where the product rounds up to the sum
    return torch.minimum(drawn, last)


def _law(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The law in float64."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    p = torch.softmax((ordered - ordered[..., :1]) / temperature, -1)
    if top_k:
        rank = torch.arange(p.shape[-1], device=p.device)
        p = _normalised(p * (rank < top_k))
    if top_p < 1:
        p = _normalised(p * (_before(p) < top_p))
    if min_p:
        p = _normalised(p * (p >= min_p * p[..., :1]))
    return torch.empty_like(p).scatter(-1, ids, p)


def _before(p: Tensor) -> Tensor:
    """The sum of the entries before each."""
    return torch.nn.functional.pad(p.cumsum(-1)[..., :-1], (1, 0))


def _normalised(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)
