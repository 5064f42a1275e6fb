"""Attention, its ragged form, the merge of partial results and the cache write.

Letters: B batch, T query tokens a sequence, L key capacity, H query heads, G KV heads (query head h reads KV
head ``h // (H // G)``), D head dim, Dv value dim, P parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_sequence(values: Tensor | None, default: int, batch: int, device: torch.device) -> Tensor:
    if values is None:
        return torch.full((batch,), default, dtype=torch.int64, device=device)
    return values.to(torch.int64)


def allowed_keys(
    q_len: int,
    kv_capacity: int,
    kv_lens: Tensor,
    *,
    kv_starts: Tensor,
    causal: bool = False,
    windows: Tensor | None = None,
    num_sinks: int = 0,
    prefix_lens: Tensor | None = None,
) -> Tensor:
    """Which keys each query may see, bool [B, G or 1, T, L].

    Query i of sequence b stands at position ``p = kv_lens[b] - q_len + i``. Key j exists if
    ``kv_starts[b] <= j < kv_lens[b]``; an existing key is allowed if (not causal or ``j <= p`` or j is in
    the prefix) and (no window or ``j > p - window`` or j is a sink). Prefix and sinks count from
    ``kv_starts[b]``. ``windows`` int64 [G or 1] has one entry a KV head, 0 meaning no window.
    """
    i = torch.arange(q_len, device=kv_lens.device)[:, None]
    j = torch.arange(kv_capacity, device=kv_lens.device)[None, None, None, :]
    end, start = (x[:, None, None, None] for x in (kv_lens, kv_starts))
    position = end - q_len + i

    allowed = (start <= j) & (j < end)
    if causal:
        visible = j <= position
        if prefix_lens is not None:
            visible = visible | (j < start + prefix_lens[:, None, None, None])
        allowed = allowed & visible
    if windows is not None:
        width = windows[None, :, None, None]
        allowed = allowed & ((width == 0) | (j > position - width) | (j < start + num_sinks))
    return allowed.expand(-1, -1, q_len, -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    num_sinks: int = 0,
    prefix_lens: Tensor | None = None,
    head_windows: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    max_kv_len: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale, softcapped and masked) v of q [B,T,H,D], k [B,L,G,D], v [B,L,G,Dv].

    Returns out [B,T,H,Dv] in q's dtype and, on request, lse [B,T,H] (natural logarithm; float32, or float64
    for float64 inputs). A row without an allowed key gives out 0, lse -inf and gradient 0. ``sink_logits``
    [H] add one logit a head to the denominator only; lse includes it. ``max_kv_len`` only bounds work
    elsewhere and means nothing here.
    """
    batch, q_len = q.shape[:2]
    capacity = k.shape[1]
    if window and head_windows is not None:
        raise RuntimeError("attention: head_windows: expected None beside window, got both")

    windows = None
    if head_windows is not None:
        windows = head_windows.to(torch.int64)
    elif window:
        windows = torch.tensor([window], device=q.device)
    ends = _per_sequence(kv_lens, capacity, batch, q.device)
    starts = _per_sequence(kv_starts, 0, batch, q.device)
    allowed = allowed_keys(
        q_len,
        capacity,
        ends,
        kv_starts=starts,
        causal=causal,
        windows=windows,
        num_sinks=num_sinks,
        prefix_lens=None if prefix_lens is None else prefix_lens.to(torch.int64),
    )
    j = torch.arange(capacity, device=q.device)
    exists = (starts[:, None] <= j) & (j < ends[:, None])
    out, lse = masked_attention(q, k, v, allowed, exists, sink_logits=sink_logits, softcap=softcap, scale=scale)
    return (out, lse) if return_lse else out


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    exists: Tensor,
    *,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of ``attention`` under a mask: allowed bool [B, G or 1, T, L]; exists bool [B, L] says which keys
    hold anything at all."""
    heads, head_dim, kv_heads = q.shape[2], q.shape[3], k.shape[2]
    dtype, group = _compute_dtype(q), heads // kv_heads
    allowed = allowed.repeat_interleave(group if allowed.shape[1] == kv_heads else heads, dim=1)
    # Keys that do not exist may hold anything, NaN included: zeros take their place before any product.
    keys, values = (
        torch.where(exists[:, :, None, None], x.to(dtype), 0).repeat_interleave(group, dim=2) for x in (k, v)
    )
    scores = torch.einsum("bthd,blhd->bhtl", q.to(dtype), keys) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    out, lse = _softmax_product(scores, allowed, values, sink_logits)
    return out.to(q.dtype), lse


def _softmax_product(
    scores: Tensor, allowed: Tensor, values: Tensor, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [B,T,H,Dv] and lse [B,T,H] of scores [B,H,T,L]; ``where`` keeps inf and NaN out of gradients."""
    sinks = None if sink_logits is None else sink_logits.to(scores.dtype)[None, :, None]
    highest = scores.detach().masked_fill(~allowed, -torch.inf)
    highest = torch.nn.functional.pad(highest, (0, 1), value=-torch.inf).amax(-1)  # at least one entry
    if sinks is not None:
        highest = torch.maximum(highest, sinks.detach())
    highest = torch.where(highest == -torch.inf, 0.0, highest)

    weights = torch.where(allowed, torch.where(allowed, scores - highest[..., None], 0.0).exp(), 0.0)
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - highest)
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    out = torch.einsum("bhtl,blhd->bthd", weights / divisor[..., None], values)
    lse = torch.where(empty, -torch.inf, highest + torch.log(divisor))
    return out, lse.transpose(1, 2)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
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
    """``attention`` of each sequence of a ragged batch: q [N,H,D], k [M,G,D], v [M,G,Dv], offsets int32
    [B+1] each.

    Rows outside the offsets come out as the empty set does: 0 and -inf.
    """
    dtype = _compute_dtype(q)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(offsets_q) - 1):
        rows = slice(offsets_q[b], offsets_q[b + 1])
        keys = slice(offsets_k[b], offsets_k[b + 1])
        part, part_lse = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            kv_starts=None if kv_starts is None else kv_starts[b : b + 1],
            causal=causal,
            window=window,
            num_sinks=num_sinks,
            prefix_lens=None if prefix_lens is None else prefix_lens[b : b + 1],
            head_windows=head_windows,
            sink_logits=sink_logits,
            softcap=softcap,
            scale=scale,
            return_lse=True,
        )
        out[rows], lse[rows] = part[0], part_lse[0]
    return (out, lse) if return_lse else out


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Joins partial attention results: outs [P,...,D], lses [P,...] to out [...,D], lse [...].

    The result is that of attention over the union of the parts' keys. A part with lse -inf is neutral.
    """
    dtype = _compute_dtype(outs)
    absent = lses == -torch.inf
    lses = lses.to(dtype)
    highest = lses.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0.0, highest)
    weights = torch.where(absent, 0.0, torch.where(absent, 0.0, lses - highest).exp())
    total = weights.sum(0)
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    parts = torch.where(absent[..., None], 0.0, outs.to(dtype))
    out = (parts * (weights / divisor)[..., None]).sum(0)
    return out.to(outs.dtype), torch.where(empty, -torch.inf, highest + torch.log(divisor))
