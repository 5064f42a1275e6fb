"""Attention over KV caches, in pages, over a tree of draft tokens or over listed tokens, and the writes into caches."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, BelowAutograd, dispatches, increment_version, tracks_grad

_paged_attention = torch.ops.effops.paged_attention.default
_tree_attention = torch.ops.effops.tree_attention.default
_sparse_attention = torch.ops.effops.sparse_attention.default
_append_kv = torch.ops.effops.append_kv.default
_commit_kv = torch.ops.effops.commit_kv.default


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Without what is off: an argument costs 0.2 µs."""
    return {name: x for name, x in options.items() if isinstance(x, Tensor) or x}


@overload
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
def paged_attention(  # type: ignore[misc]  # the overloads spell the options loosely
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    kv_starts: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    num_sinks: int = 0,
    prefix_lens: Tensor | None = None,
    head_windows: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` over a KV cache in pages: decode, chunked prefill, or a mixture of both in one call.

    Token j of a sequence lies in the page of entry ``j // page`` of its row of the table, at place ``j % page``.
    Entries that hold no visible key are never read.

    Args:
        q: ``[B, T, H, D]``, or ``[N, H, D]`` with ``cu_seqlens_q`` where sequences differ in new tokens.
        k_pages: ``[P, page, G, D]``; v_pages: ``[P, page, G, Dv]``, q's dtype; any page size, any strides.
        page_table: int32 ``[B, entries]``, or ``[B, G, entries]`` where each KV head has pages of its own.
        kv_lens: int32 ``[B]``, valid keys including the new ones; or ``[B, G]``, a length for each KV head.
        cu_seqlens_q: int32 ``[B + 1]``, ascending from 0; rows past the last offset give out 0 and lse -inf.
        max_q_len, max_kv_len: host-side bounds of the lengths.

    The other options, results and errors are those of :func:`attention`, and so are the bits for the same keys,
    wherever the pages lie. No gradient. Paging as in vLLM (arXiv 2309.06180).
    """
    options = _given(
        {
            "cu_seqlens_q": cu_seqlens_q, "kv_starts": kv_starts, "causal": causal, "window": window,
            "num_sinks": num_sinks, "prefix_lens": prefix_lens, "head_windows": head_windows,
            "sink_logits": sink_logits, "softcap": softcap, "max_q_len": max_q_len,
        }
    )  # fmt: skip
    options |= {"scale": scale, "max_kv_len": max_kv_len}
    if dispatches(q, k_pages, v_pages, sink_logits):
        out, lse = _paged_attention(q, k_pages, v_pages, page_table, kv_lens, **options)
    else:
        with BelowAutograd():
            out, lse = _paged_attention(q, k_pages, v_pages, page_table, kv_lens, **options)
    return (out, lse) if return_lse else out


@overload
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, *, return_lse: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def tree_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestors: Tensor,
    *,
    depths: Tensor | None = None,
    kv_lens: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    kv_starts: Tensor | None = None,
    window: int | None = None,
    num_sinks: int = 0,
    head_windows: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a tree of T draft tokens, whose keys are the last T of each sequence, for their verification.

    Row i sees every committed key (those before the last T) and the tree's keys whose bit it has. It stands at position
    ``p_i = kv_len - T + depths[i]``; with a window it sees committed key j only if ``j > p_i - window`` and tree key j
    only if ``p_j > p_i - window``, sinks apart. The mask is read for the last T keys alone.

    Args:
        q: ``[B, T, H, D]``, or ``[N, H, D]`` with ``cu_seqlens_q`` where trees differ in size.
        k: ``[B, L, G, D]``, v: ``[B, L, G, Dv]``; pages ``[P, page, G, D]`` with ``page_table``.
        ancestors: int64 ``[B or 1, T, ceil(T / 64)]``: bit ``j & 63`` of word ``j >> 6``, least significant first,
            shows row i the key of row j. Any mask is allowed; bits of T and above are ignored. For ragged q, T is at
            least the
            largest tree. :func:`pack_ancestors` makes it from parents.
        depths: int32 ``[B or 1, T]``; None: the number of the row's bits, less one.
        kv_lens: int32 ``[B]`` (``[B, G]`` beside a page table): 0, an absent sequence, or at least T. None: L.
        page_table, cu_seqlens_q, max_q_len, max_kv_len: as in :func:`paged_attention`.

    The other options, results and errors are those of :func:`attention`. No gradient. Tree attention as in SpecInfer
    (arXiv 2305.09781, section 4.2) and Medusa (arXiv 2401.10774).
    """
    options = _given(
        {
            "depths": depths, "kv_lens": kv_lens, "page_table": page_table, "cu_seqlens_q": cu_seqlens_q,
            "kv_starts": kv_starts, "window": window, "num_sinks": num_sinks, "head_windows": head_windows,
            "sink_logits": sink_logits, "softcap": softcap, "max_q_len": max_q_len,
        }
    )  # fmt: skip
    options |= {"scale": scale, "max_kv_len": max_kv_len}
    if dispatches(q, k, v, sink_logits):
        out, lse = _tree_attention(q, k, v, ancestors, **options)
    else:
        with BelowAutograd():
            out, lse = _tree_attention(q, k, v, ancestors, **options)
    return (out, lse) if return_lse else out


@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, return_lse: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    kv_lens: Tensor | None = None,
    page_table: Tensor | None = None,
    kv_starts: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token a sequence to the listed tokens of its cache alone, read where they lie.

    Nothing is gathered first. A token that is listed twice counts twice; the order of a list changes rounding only.

    Args:
        q: ``[B, 1, H, D]``.
        k: ``[B, L, G, D]``, v: ``[B, L, G, Dv]``; pages ``[P, page, G, D]`` with ``page_table``.
        indices: int32 ``[B, 1, S]``, one list for all heads; ``[B, G, S]``, one for each KV head; or ``[B, H, S]``, one
            for each query head, which reads keys that heads of a group share more than once. -1 anywhere names no
            token; others are positions in ``[kv_starts, kv_lens)``.
        kv_lens, page_table, kv_starts: as in :func:`paged_attention` and :func:`attention`.

    The other options, results and errors are those of :func:`attention`. A list without tokens gives out 0 and lse
    -inf. No gradient. The second step of Double Sparsity (arXiv 2408.07092, section 3), Quest and heavy-hitter reads.
    """
    options = _given({"kv_lens": kv_lens, "page_table": page_table, "kv_starts": kv_starts, "sink_logits": sink_logits,
                      "softcap": softcap})  # fmt: skip
    if scale is not None:
        options["scale"] = scale
    if dispatches(q, k, v, sink_logits):
        out, lse = _sparse_attention(q, k, v, indices, **options)
    else:
        with BelowAutograd():
            out, lse = _sparse_attention(q, k, v, indices, **options)
    return (out, lse) if return_lse else out


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, page_table: Tensor | None = None
) -> None:
    """Writes new keys and values into a cache, in place.

    Args:
        k_cache: ``[B, L, G, D]``; v_cache: ``[B, L, G, Dv]``; any strides.
        k: ``[B, T, G, D]``; v: ``[B, T, G, Dv]``.
        slots: int32 ``[B, T]``, where in its sequence each token goes; -1 skips it. Of two tokens of a sequence that
            name one slot the later one stays. Every slot is checked before anything is written.
        page_table: int32 ``[B, entries]`` or ``[B, G, entries]``: the caches are pages ``[P, page, G, D]``, as in
            :func:`paged_attention`.
    """
    options = {} if page_table is None else {"page_table": page_table}
    if tracks_grad(k_cache, v_cache, k, v):
        _append_kv(k_cache, v_cache, k, v, slots, **options)
        return
    with BelowADInplaceOrView():
        _append_kv(k_cache, v_cache, k, v, slots, **options)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache))


def commit_kv(
    k_cache: Tensor, v_cache: Tensor, nodes: Tensor, starts: Tensor, *, page_table: Tensor | None = None
) -> None:
    """Moves the keys and values of accepted tree nodes to where plain decoding would have put them, in place.

    Of sequence b, the rows at slot ``starts[b] + nodes[b][j]`` go to slot ``starts[b] + j``, in the order of j, so that
    none is lost where they overlap. Accepted paths have consecutive depths: their keys need no new rotation.

    Args:
        k_cache: ``[B, L, G, D]``; v_cache: ``[B, L, G, Dv]``; any strides; pages with ``page_table``.
        nodes: int32 ``[B, M]``, ascending, -1 after the last: what ``verify_*`` return. starts: int32 ``[B]``, the slot
            of each tree's root. All of it is checked before anything is written.
        page_table: as in :func:`append_kv`.
    """
    options = {} if page_table is None else {"page_table": page_table}
    if tracks_grad(k_cache, v_cache):
        _commit_kv(k_cache, v_cache, nodes, starts, **options)
        return
    with BelowADInplaceOrView():
        _commit_kv(k_cache, v_cache, nodes, starts, **options)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache))
