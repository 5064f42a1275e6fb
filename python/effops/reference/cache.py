"""Attention over KV caches in pages, over trees of draft tokens or selected tokens, and the writes into caches.

Letters: P pages of ``page`` tokens; the others as in :mod:`effops.reference.attention`. A page table int32
[B, entries], or [B, G, entries] with an entry list a KV head, says in which page token j of a sequence lies: the page
of entry ``j // page``, at place ``j % page``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.reference.attention import _compute_dtype, attention, masked_attention


def gather_pages(pages: Tensor, entries: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens [length, ...] of one sequence; entries int32 [n]. Later entries are not looked at."""
    size = pages.shape[1]
    used = entries[: -(-length // size) if size else 0].long()
    return pages[used].flatten(0, 1)[:length]


def _unpaged(k: Tensor, v: Tensor, table: Tensor, b: int, g: int, length: int, start: int) -> tuple[Tensor, Tensor]:
    """k and v [1, length, 1, D] of one sequence and KV head; keys before ``start`` are zero."""
    entries = table[b] if table.dim() == 2 else table[b, g]
    size = k.shape[1]
    entries = entries.clone()
    entries[: start // size if size else 0] = 0  # never read
    parts = [gather_pages(x[:, :, g : g + 1], entries, length)[None].clone() for x in (k, v)]
    for x in parts:
        x[:, : min(start, length)] = 0
    return parts[0], parts[1]


def _row_slices(q: Tensor, cu_seqlens_q: Tensor | None) -> list[Tensor]:
    """The queries [T_b, H, D] of each sequence, as views of q."""
    if cu_seqlens_q is None:
        return list(q.unbind(0))
    offsets = cu_seqlens_q.tolist()
    return [q[offsets[b] : offsets[b + 1]] for b in range(len(offsets) - 1)]


def _empty_result(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=_compute_dtype(q), device=q.device)
    return q.new_zeros(*q.shape[:-1], v.shape[-1]), lse


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    kv_starts: Tensor | None = None,
    head_windows: Tensor | None = None,
    sink_logits: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` over k_pages [P,page,G,D], v_pages [P,page,G,Dv]: q [B,T,H,D], or [N,H,D] with offsets of a ragged
    batch, whose rows past the last one give 0 and -inf. kv_lens int32 [B], or [B,G] where KV heads differ in length."""
    out, lse = _empty_result(q, v_pages)
    group = q.shape[-2] // k_pages.shape[2]
    parts = [_row_slices(x, cu_seqlens_q) for x in (q, out, lse)]
    for b, (own, to, to_lse) in enumerate(zip(*parts, strict=True)):
        for g in range(k_pages.shape[2]):
            heads = slice(g * group, (g + 1) * group)
            length = int(kv_lens[b] if kv_lens.dim() == 1 else kv_lens[b, g])
            start = 0 if kv_starts is None else int(kv_starts[b])
            k, v = _unpaged(k_pages, v_pages, page_table, b, g, length, start)
            part = attention(
                own[None, :, heads], k, v,
                kv_starts=None if kv_starts is None else kv_starts[b : b + 1],
                prefix_lens=None if prefix_lens is None else prefix_lens[b : b + 1],
                head_windows=None if head_windows is None else head_windows[g : g + 1],
                sink_logits=None if sink_logits is None else sink_logits[heads],
                return_lse=True, **options,
            )  # fmt: skip
            to[:, heads], to_lse[:, heads] = part[0][0], part[1][0]
    return (out, lse) if return_lse else out


def tree_mask(ancestors: Tensor) -> Tensor:
    """bool [..., T, T]: which rows bit masks int64 [..., T, ceil(T/64)] name; bits of T and above are ignored."""
    tokens = ancestors.shape[-2]
    j = torch.arange(tokens, device=ancestors.device)
    return (ancestors[..., j >> 6] >> (j & 63)) & 1 == 1


def pack_mask(mask: Tensor) -> Tensor:
    """int64 [..., T, ceil(T/64)] of a bool mask [..., T, T]: the inverse of ``tree_mask``."""
    tokens = mask.shape[-1]
    words = torch.zeros(*mask.shape[:-1], -(-tokens // 64), dtype=torch.int64, device=mask.device)
    for j in range(tokens):
        words[..., j >> 6] |= mask[..., j].long() << (j & 63)
    return words


def tree_attention(
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
    """Attention of T rows whose keys are the last T of each sequence, under a T x T bit mask.

    With L0 = kv_len - T committed keys, row i stands at ``p_i = L0 + depths[i]`` (default: its bits, less one) and sees
    committed key j iff ``kv_start <= j`` and (no window or ``j > p_i - window`` or j is a sink), and the key of row j
    iff bit j of ``ancestors[i]`` is set, its slot ``L0 + j`` is not below kv_start, and (no window or ``p_j > p_i -
    window`` or p_j is a sink). q, page_table, cu_seqlens_q and kv_lens as in ``paged_attention``; k, v [B,L,G,D]
    without a page table. ancestors int64 [B or 1, T, ceil(T/64)], depths int32 [B or 1, T].
    """
    out, lse = _empty_result(q, v)
    kv_heads = k.shape[2]
    group = q.shape[-2] // kv_heads
    parts = [_row_slices(x, cu_seqlens_q) for x in (q, out, lse)]
    for b, (own, to, to_lse) in enumerate(zip(*parts, strict=True)):
        tokens, start = own.shape[0], 0 if kv_starts is None else int(kv_starts[b])
        bits = ancestors[b if ancestors.shape[0] > 1 else 0, :tokens]
        own_mask = tree_mask(bits)[:, :tokens] if ancestors.shape[1] else bits.new_zeros(0, 0, dtype=torch.bool)
        own_depths = own_mask.sum(1) - 1 if depths is None else depths[b if depths.shape[0] > 1 else 0, :tokens].long()
        for g in range(kv_heads):
            heads = slice(g * group, (g + 1) * group)
            length = k.shape[1] if kv_lens is None else int(kv_lens[b] if kv_lens.dim() == 1 else kv_lens[b, g])
            if length == 0:
                if sink_logits is not None:
                    to_lse[:, heads] = sink_logits[heads].to(lse.dtype)
                continue
            if page_table is None:
                keys, values = k[b : b + 1, :length, g : g + 1], v[b : b + 1, :length, g : g + 1]
            else:
                keys, values = _unpaged(k, v, page_table, b, g, length, start)
            width = int(window or 0) if head_windows is None else int(head_windows[g])
            committed = length - tokens
            slots = torch.arange(length, device=q.device)
            positions = torch.cat([slots[:committed], committed + own_depths])
            allowed = torch.cat([own_mask.new_ones(tokens, committed), own_mask], 1) & (slots >= start)
            if width:
                near = positions > (committed + own_depths)[:, None] - width
                allowed = allowed & (near | (positions < start + num_sinks))
            part, part_lse = masked_attention(
                own[None, :, heads], keys, values, allowed[None, None], (slots >= start)[None],
                sink_logits=None if sink_logits is None else sink_logits[heads], softcap=softcap, scale=scale,
            )  # fmt: skip
            to[:, heads], to_lse[:, heads] = part[0], part_lse[0]
    return (out, lse) if return_lse else out


def selected_keys(
    k: Tensor, v: Tensor, indices: Tensor, page_table: Tensor | None, b: int, h: int, group: int
) -> tuple[Tensor, Tensor]:
    """The keys and values [n, D] that ``sparse_attention``'s query head h of sequence b attends to."""
    kv_heads, lists, g = k.shape[2], indices.shape[1], h // group
    row = indices[b, 0 if lists == 1 else g if lists == kv_heads else h]
    listed = row[row >= 0].long()
    if page_table is None:
        return k[b, listed, g], v[b, listed, g]
    entries, size = page_table[b] if page_table.dim() == 2 else page_table[b, g], k.shape[1]
    pages = entries[listed // max(size, 1)].long()
    return k[pages, listed % max(size, 1), g], v[pages, listed % max(size, 1), g]


def sparse_attention(
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
    """Attention of q [B,1,H,D] to the tokens of k, v that indices int32 [B, 1 or G or H, S] list, as often as they list
    them; -1 names none. Each query head is plain attention over the tokens of its list."""
    out, lse = _empty_result(q, v)
    heads = q.shape[2]
    for b in range(q.shape[0]):
        for h in range(heads):
            keys, values = selected_keys(k, v, indices, page_table, b, h, heads // k.shape[2])
            own = slice(h, h + 1)
            part = attention(
                q[b : b + 1, :, own], keys[None, :, None], values[None, :, None],
                sink_logits=None if sink_logits is None else sink_logits[own],
                softcap=softcap, scale=scale, return_lse=True,
            )  # fmt: skip
            out[b, :, own], lse[b, :, own] = part[0][0], part[1][0]
    return (out, lse) if return_lse else out


def _place(cache: Tensor, page_table: Tensor | None, b: int, slot: int) -> Any:
    """Where in the cache, [B,L,G,D] or pages, the rows of a token lie: the index of its [G,D] rows."""
    if page_table is None:
        return (b, slot)
    size = cache.shape[1]
    if page_table.dim() == 2:
        return (int(page_table[b, slot // size]), slot % size)
    heads = torch.arange(cache.shape[2])
    return (page_table[b, :, slot // size].long(), slot % size, heads)


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, page_table: Tensor | None = None
) -> None:
    """Writes k [B,T,G,D], v [B,T,G,Dv] in place into k_cache [B,L,G,D], v_cache [B,L,G,Dv], or into pages, at slots
    int32 [B,T] of each sequence.

    A slot of -1 is skipped.
    """
    for b, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            if slot >= 0:
                for cache, new in ((k_cache, k), (v_cache, v)):
                    cache[_place(cache, page_table, b, slot)] = new[b, t]


def commit_kv(
    k_cache: Tensor, v_cache: Tensor, nodes: Tensor, starts: Tensor, *, page_table: Tensor | None = None
) -> None:
    """Moves the rows of accepted nodes together, in place: of sequence b, slot ``starts[b] + nodes[b][j]`` goes to
    ``starts[b] + j``. nodes int32 [B,M]: ascending, -1 after the last."""
    for b, (row, start) in enumerate(zip(nodes.tolist(), starts.tolist(), strict=True)):
        for j, node in enumerate(row):
            if node >= 0:
                for cache in (k_cache, v_cache):
                    moved = cache[_place(cache, page_table, b, start + node)].clone()
                    cache[_place(cache, page_table, b, start + j)] = moved
