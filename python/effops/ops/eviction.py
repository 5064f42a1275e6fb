"""Attention mass, the attention that every key of a cache has had, and the append of a cache that evicts by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, increment_version, tracks_grad

_accumulate_mass = torch.ops.effops.accumulate_mass.default
_append_evicting = torch.ops.effops.append_evicting.default


def accumulate_mass(
    mass: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    num_sinks: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    page_table: Tensor | None = None,
) -> None:
    """Adds the attention that every key gets from these queries to its mass, in place.

    ``mass[b, g, j] += sum over rows i and the query heads h of KV head g of exp(s_ij - lse[b, i, h])`` over the keys
    that row i may see, with the score s and the masks of :func:`attention`: beside its lse the sum of the weights that
    it gave key j. Weights are computed again tile by tile and never kept. Bytes read: the keys once; half of
    attention's multiplications. Sums do not depend on the batch, the number of threads or the page placement.

    Args:
        mass: float32 ``[B, G, L]`` (float64 beside float64 queries), any strides. Keys at or past ``kv_lens`` and
            before ``kv_starts`` are neither read nor written.
        q: ``[B, T, H, D]``, float32, bfloat16, float16 or float64; row i stands at position ``kv_lens - T + i``.
        k: ``[B, L, G, D]``, q's dtype; pages ``[P, page, G, D]`` with ``page_table``.
        lse: mass's dtype ``[B, T, H]``, as :func:`attention` returned it. A row of -inf adds nothing, so that rows are
            left out by filling them with -inf.
        kv_lens, kv_starts, causal, window, num_sinks, softcap, scale: as in :func:`attention`.
        page_table: int32 ``[B, entries]`` or ``[B, G, entries]`` as in :func:`paged_attention`; ``L = entries * page``.

    Raises:
        RuntimeError: shapes, dtypes or lengths that do not fit; nothing is written. No gradient.

    The scores of H2O (arXiv 2306.14048) and SnapKV (arXiv 2404.14469).
    """
    options: dict[str, Any] = {
        "kv_lens": kv_lens, "kv_starts": kv_starts, "causal": causal, "window": window, "num_sinks": num_sinks,
        "softcap": softcap, "page_table": page_table,
    }  # fmt: skip
    options = {name: x for name, x in options.items() if isinstance(x, Tensor) or x}  # an argument costs 0.2 µs
    if scale is not None:
        options["scale"] = scale
    if tracks_grad(mass, q, k, lse):
        _accumulate_mass(mass, q, k, lse, **options)
        return
    with BelowADInplaceOrView():
        _accumulate_mass(mass, q, k, lse, **options)
    if not mass.is_inference():
        increment_version((mass,))


def append_evicting(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    positions: Tensor,
    new_positions: Tensor,
    *,
    recent: int,
    num_sinks: int = 0,
) -> None:
    """Writes new tokens into a cache of L slots a KV head, where they are full in the place of the entry that has had
    the least attention. In place.

    The tokens of a sequence go one after the other, into each KV head by itself: into its first free slot, and where
    there is none into that of the entry with the least mass, of equals the oldest, among those that are neither one of
    the first ``num_sinks`` tokens nor one of the ``recent`` newest, the new one counted
    (``num_sinks <= position <= new - recent``). The new entry's mass is 0. With ``num_sinks + recent <= L`` and
    positions that ascend there always is such an entry.

    Args:
        k_cache: ``[B, L, G, D]``; v_cache: ``[B, L, G, Dv]``; any strides.
        k: ``[B, T, G, D]``; v: ``[B, T, G, Dv]``.
        mass: float32 ``[B, G, L]`` (float64 beside float64 caches); a NaN counts as infinite.
        positions: int32 ``[B, G, L]``, the token that each slot holds; negative where it is free.
        new_positions: int32 ``[B, T]``, the positions of the new tokens; -1 skips one.
        recent: 1 or more; num_sinks: 0 or more.

    Raises:
        RuntimeError: a token finds neither a free slot nor an entry that may go (a GPU drops it unless
            ``EFFOPS_CHECK=1``), or shapes and dtypes that do not fit; nothing is written. No gradient.

    One step of H2O (arXiv 2306.14048, section 4.2).
    """
    if tracks_grad(k_cache, v_cache, k, v, mass):
        _append_evicting(k_cache, v_cache, k, v, mass, positions, new_positions, recent=recent, num_sinks=num_sinks)
        return
    with BelowADInplaceOrView():
        _append_evicting(k_cache, v_cache, k, v, mass, positions, new_positions, recent=recent, num_sinks=num_sinks)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache, mass, positions))
