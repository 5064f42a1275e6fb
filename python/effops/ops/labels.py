"""Which tokens of a cache a query is likeliest to attend to: by labels, a few channels of every key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, BelowAutograd, dispatches, increment_version, tracks_grad

_append_labels = torch.ops.effops.append_labels.default
_label_topk = torch.ops.effops.label_topk.default


def _given(**options: Any) -> dict[str, Any]:
    return {name: x for name, x in options.items() if x is not None}


def append_labels(
    labels: Tensor,
    k: Tensor,
    slots: Tensor,
    channels: Tensor,
    *,
    scales: Tensor | None = None,
    offsets: Tensor | None = None,
    bits: int = 0,
) -> None:
    """Writes the labels of new keys in place.

    With x the channel of a key, a label is ``x - offset`` as a number, or with ``bits`` the integer
    ``round((x - offset) / scale)``, ties to even, within [-2^(bits-1), 2^(bits-1) - 1]; NaN becomes 0.

    Args:
        labels: ``[B, L, G, r]``, float32, bfloat16 or float16; with ``bits`` int32 ``[B, L, G, ceil(r * bits / 32)]``:
            channel i is bits ``[bits * i, bits * (i + 1))`` of word ``i // (32 // bits)``, from the least significant
            on, as an unsigned number less ``2^(bits-1)``. Any strides; scoring is fastest where neighbouring tokens
            are neighbours in memory (``[B, G, words, L]`` seen through a permutation).
        k: ``[B, T, G, D]``, any floating dtype.
        slots: int32 ``[B, T]``; -1 skips.
        channels: int32 ``[G, r]`` in [0, D), those of a head in the order of their labels.
        scales: float32 ``[G, r]``, with ``bits`` alone; None: 1.
        offsets: float32 ``[G, r]``; None: 0. They change no head's order of tokens, only how large its scores are
            beside another's, and how well few bits tell keys apart.
        bits: 4, 8, or 0 for labels that are numbers.

    Raises:
        RuntimeError: a slot, a channel, a dtype or a shape that does not fit; nothing is written. No gradient.
    """
    options = _given(scales=scales, offsets=offsets)
    if tracks_grad(labels, k, *options.values()):
        _append_labels(labels, k, slots, channels, bits=bits, **options)
        return
    with BelowADInplaceOrView():
        _append_labels(labels, k, slots, channels, bits=bits, **options)
    if not labels.is_inference():
        increment_version((labels,))


def label_topk(
    q: Tensor,
    labels: Tensor,
    channels: Tensor,
    k: int,
    *,
    scales: Tensor | None = None,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    num_sinks: int = 0,
    window: int = 0,
    each_head: bool = False,
    bits: int = 0,
) -> Tensor:
    """The k tokens of each list with the largest scores by their labels: what :func:`sparse_attention` takes.

    A query head's score of a token is the dot product of its ``channels`` with the token's label, and a list's score
    the largest of its heads'. Of equal scores the lowest positions are taken. Beside labels of few bits, queries have
    eight: channel c of head h is ``round(q[c] * scale[c] / step)`` with ``step = max |q * scale| / 127`` over the
    list's heads, so that scores are integers, and results the same on every machine. Labels that are numbers are
    multiplied in float32. Bytes read: ``r * bits / 8`` a token and KV head.

    Args:
        q: ``[B, 1, H, D]``, any floating dtype; its values are rounded to float32.
        labels, channels, scales, bits: as :func:`append_labels` wrote them. Labels of tokens outside the cache are
            never read.
        k: tokens a list, ``num_sinks`` and ``window`` included.
        kv_lens, kv_starts: int32 ``[B]``, the tokens of each sequence that there are; None: all.
        num_sinks, window: so many first and last tokens are in every list whatever their scores.
        each_head: a list for each query head ``[B, H, k]`` instead of each KV head.

    Returns:
        int32 ``[B, G, k]``, ascending; -1 after the last where a sequence has fewer than k tokens.

    Raises:
        RuntimeError: k below ``num_sinks + window``, lengths or channels out of range, shapes that do not fit. No
            gradient.

    Double Sparsity (arXiv 2408.07092, section 3.2).
    """
    options = _given(scales=scales, kv_lens=kv_lens, kv_starts=kv_starts)
    options |= {"num_sinks": num_sinks, "window": window, "each_head": each_head, "bits": bits}
    if dispatches(q, labels, scales):
        return _label_topk(q, labels, channels, k, **options)
    with BelowAutograd():
        return _label_topk(q, labels, channels, k, **options)
