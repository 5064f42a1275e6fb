"""How far a law of next tokens may lie from the exact one, and which tokens rounding may keep or drop.

The notation of :mod:`effops.reference.bounds`. A weight exp(z), z = (x - maximum) / temperature, is computed from a
difference, a factor and a product (3 w |z|) and by exp (4 w): relative error e. A sum of weights S is off by E S,
where E is the mean of e under the law, and by the roundings of float64 sums.

The order of the logits is exact, and so is top-k. top-p compares with its threshold the mass before a token, which
is off by at most 2 E / (1 - E); min-p compares a weight, which is off by e. Only a token whose own comparison is that
near may be kept by one right computation and dropped by another. It moves the sum that divides all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effops.reference.bounds import FLUSH, Interval, _compute_roundoff
from effops.reference.sampling import _before, _law


class Kept(NamedTuple):
    """bool [...,V]: the tokens that every right computation keeps, and those that some may."""

    surely: Tensor
    possibly: Tensor


def sampling_probs_bound(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Interval, Kept]:
    """The law of ``sampling_probs`` [...,V] and its :class:`Kept` tokens.

    With S the exact sum over the tokens kept for certain and S' that over all that may be, a probability lies in
    ``[weight (1 - e) / (S' (1 + E)), weight (1 + e) / (S (1 - E))]``, rounded once more; it may also be 0 where the
    token is not certain, and is 0 where it is impossible. Without a token near an edge, S' = S.
    """
    law = _law(logits.detach(), temperature, top_k, top_p, min_p)
    if temperature == 0:
        return Interval(law, torch.zeros_like(law)), Kept(law > 0, law > 0)
    count, w = logits.shape[-1], _compute_roundoff(logits.dtype)
    if logits.dtype == torch.float64:
        w = 2 * w  # the exact result is computed in float64 too
    ordered, ids = logits.detach().double().sort(dim=-1, descending=True, stable=True)
    z = (ordered - ordered[..., :1]) / temperature
    weight = z.exp()
    e = torch.expm1(w * (3 * z.abs().clamp(max=800) + 5))  # beyond 800 nothing is left in any dtype
    sums = (count + 8) * 2.0**-52 + count * FLUSH  # the largest weight is 1

    def off(may: Tensor, surely: Tensor) -> Tensor:
        """E, relative to the smallest sum."""
        return (weight * e * may).sum(-1, keepdim=True) / (weight * surely).sum(-1, keepdim=True) + sums

    rank = torch.arange(count, device=logits.device)
    surely = possibly = (rank < (top_k or count)).expand_as(z)
    if top_p < 1:
        share = off(possibly, surely)
        near = 2 * share / (1 - share)
        kept = weight * possibly
        before = _before(kept / kept.sum(-1, keepdim=True))
        surely = surely & ((before < top_p - near) | (rank == 0))
        possibly = possibly & (before <= top_p + near)
    if min_p:
        surely = surely & ((weight * (1 - e) - FLUSH >= min_p) | (z == 0))
        possibly = possibly & (weight * (1 + e) + FLUSH >= min_p)

    share, result = off(possibly, surely), 1 + w
    least, most = ((weight * mask).sum(-1, keepdim=True) for mask in (surely, possibly))
    low = weight * (1 - e) / (most * (1 + share)) / result - 2 * FLUSH
    high = weight * (1 + e) / (least * (1 - share)) * result + 2 * FLUSH
    low, high = torch.where(surely, low, 0.0), torch.where(possibly, high, 0.0)
    low, high, surely, possibly = (torch.empty_like(x).scatter(-1, ids, x) for x in (low, high, surely, possibly))
    return Interval(law, torch.maximum(high - law, law - low)), Kept(surely, possibly)


def sample_bound(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Interval, Kept]:
    """The sums of the law in id order [...,V], and its :class:`Kept` tokens: a right draw with the uniform u is a
    possible token t with ``sums[t - 1] <= u < sums[t]`` up to the errors. The errors of the probabilities add up,
    from either end."""
    law, kept = sampling_probs_bound(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    upward = law.error.cumsum(-1)
    error = torch.minimum(upward, upward[..., -1:] - upward) + 2 * (logits.shape[-1] + 8) * 2.0**-52
    return Interval(law.value.cumsum(-1), error), kept
