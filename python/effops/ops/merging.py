"""Entries that leave a KV cache, merged into those that stay."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, increment_version, tracks_grad

_merge_kv = torch.ops.effops.merge_kv.default

Merging = Literal["none", "averaged", "pivotal", "weighted"]


class MergedEntries(NamedTuple):
    """Where the entries of a cache have gone.

    ``nearest``: int32 ``[B, G, L]``, the row that each entry is part of now; -1 where it is part of none.
    ``similarity``: float32 ``[B, G, L]`` (float64 beside float64 caches), the cosine of an evicted entry's key and the
    most similar kept one, merged or not; 1 for kept entries, 0 at or past ``kv_lens`` and where none was asked for.
    """

    nearest: Tensor
    similarity: Tensor


def merge_kv(
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    *,
    kv_lens: Tensor | None = None,
    merging: Merging = "pivotal",
    least_similarity: float | None = None,
) -> MergedEntries:
    """Leaves the ``kept`` entries in a cache, at its front, and merges all others into them. In place.

    For each sequence and KV head by itself: every valid entry that is not kept is merged into the kept one whose key is
    the most similar to its own by the cosine, of equals the first; then the kept entries move to rows 0, 1, … in their
    order. Later rows stay as they are. A kept key or value x with n entries e merged into it becomes

    - ``"averaged"``: ``(x + sum e) / (n + 1)``,
    - ``"pivotal"``: ``(x + sum (e + x) / 2) / (n + 1)``,
    - ``"weighted"``: ``(x + sum similarity · e) / (n + 1)``,

    keys and values by the same assignment, from the x before; with n = 0, and with ``"none"``, its bits stay. Keys that
    carry a rotary embedding are merged as they are: an approximation where positions differ. A key whose norm is 0, not
    a normal number or not finite has the similarity 0 with all others. Sums go in the order of the entries, in float32
    (float64), and are rounded once; results do not depend on the batch or the number of threads. Multiplications:
    D for each pair of an evicted and a kept entry; no matrix of similarities is kept.

    Args:
        k: ``[B, L, G, D]``; v: ``[B, L, G, Dv]``; float32, bfloat16, float16 or float64, any strides.
        kept: int32 ``[B, G, N]``, the entries that stay: ascending, -1 to the end where there are fewer.
        kv_lens: int32 ``[B]``, the valid entries of each sequence (None: L); later ones are neither read nor written.
        merging: see above.
        least_similarity: entries less similar than this to every kept one are evicted without a trace.

    Raises:
        RuntimeError: shapes, dtypes, values or a merging that do not fit; nothing is written. No gradient.

    The merging of LOOK-M (arXiv 2406.18139, section 3.3); its code filters by the mean similarity of all heads, where
    ``least_similarity`` is a head's own.
    """
    if tracks_grad(k, v):
        return MergedEntries(
            *_merge_kv(k, v, kept, kv_lens=kv_lens, merging=merging, least_similarity=least_similarity)
        )
    with BelowADInplaceOrView():
        merged = _merge_kv(k, v, kept, kv_lens=kv_lens, merging=merging, least_similarity=least_similarity)
    if not k.is_inference():
        increment_version((k, v))
    return MergedEntries(*merged)
