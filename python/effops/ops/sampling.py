"""From logits to next tokens: the filtered law, and a draw from it."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_sample = torch.ops.effops.sample.default
_sampling_probs = torch.ops.effops.sampling_probs.default


def sample(
    logits: Tensor,
    uniforms: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """A draw a row from the law of :func:`sampling_probs`, by inverse CDF in id order.

    The token is the first whose probabilities, summed from id 0 to its own, exceed the row's uniform. It never has
    probability 0, however sums round.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64, any strides.
        uniforms: float64 ``[...]`` in [0, 1). Not float32: its uniforms are multiples of 2^-24, which no draw of a
            rarer token can be told apart by. At temperature 0 they decide nothing and may be None.
        temperature, top_k, top_p, min_p: as in :func:`sampling_probs`.

    Returns:
        int64 ``[...]``. The same for a row whatever the batch, the strides and the number of threads. No gradient.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if dispatches(logits, uniforms):
        return _sample(logits, uniforms, **options)
    with BelowAutograd():
        return _sample(logits, uniforms, **options)


def sampling_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The law of the next token: softmax of ``logits / temperature``, then each filter, renormalised after each.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64, any strides. -inf is a token that never comes; a
            row with NaN or inf, or with nothing above -inf, is an error that names it.
        temperature: 0 is greedy: all mass on the first of equal maxima.
        top_k: keeps so many of the largest logits; 0, or V and more, keeps all.
        top_p: keeps the smallest descending prefix with at least this mass; 1 keeps all.
        min_p: keeps what has at least ``min_p`` times the largest probability; 0 keeps all.

    Equal logits at the edge of top-k or top-p stay in the order of their ids.

    Returns:
        float32 ``[..., V]`` (float64 for float64 logits), computed in that dtype with sums in float64. No gradient.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if dispatches(logits):
        return _sampling_probs(logits, **options)
    with BelowAutograd():
        return _sampling_probs(logits, **options)
