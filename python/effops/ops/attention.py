"""Attention over dense and ragged batches, merging of partial results."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches

_attention = torch.ops.effops.attention.default
_varlen_attention = torch.ops.effops.varlen_attention.default
_merge_states = torch.ops.effops.merge_states.default


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: object) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def attention(  # type: ignore[misc]  # the overloads spell the options loosely
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
    """Scaled dot-product attention of T new tokens a sequence against up to L keys, without a mask tensor.

    Query i of sequence b stands at position ``p = kv_lens[b] - T + i`` (bottom-right alignment; p may be negative).
    It sees key j iff ``kv_starts[b] <= j < kv_lens[b]``, and ``j <= p`` or ``j < prefix_lens[b]`` or not ``causal``,
    and ``j > p - window`` or ``j < num_sinks`` or no window. Window, sinks and prefix count from ``kv_starts``.

    Args:
        q: ``[B, T, H, D]``, float32, bfloat16, float16, or (CPU) float64; any strides.
        k: ``[B, L, G, D]``, v: ``[B, L, G, Dv]``, q's dtype; query head h reads KV head ``h // (H / G)``.
        kv_lens: int32 ``[B]``, valid keys including the T new ones; None: all L. Keys beyond are never read.
        kv_starts: int32 ``[B]``, first existing key (left padding).
        window: visible keys to the left, the query's own included; None or 0: all.
        prefix_lens: int32 ``[B]``, keys that every query sees in spite of ``causal``.
        head_windows: int32 ``[G]``, a window of its own for each KV head, 0 for none; excludes ``window``.
        sink_logits: float32 ``[H]``, logits that enter the denominator only.
        softcap: ``s -> softcap * tanh(s / softcap)`` after scaling; 0: off.
        scale: factor of the scores; None: ``D ** -0.5``.
        max_kv_len: host-side bound of ``kv_lens``.
        return_lse: also return the log-sum-exp of each row's scores, the sink included.

    Returns:
        out ``[B, T, H, Dv]`` in q's dtype; with ``return_lse`` also lse ``[B, T, H]``, float32 (float64 for float64),
        natural logarithm. A row without keys gives out 0 and lse -inf.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.

    Differentiable in q, k, v and sink_logits, through out and lse. Online softmax over key tiles as in
    FlashAttention-2 (arXiv 2307.08691); its meaning is :func:`effops.reference.attention`.
    """
    options: dict[str, object] = {"kv_lens": kv_lens, "causal": causal, "max_kv_len": max_kv_len}
    if window:  # what is off stays out: an argument costs 0.2 µs
        options["window"] = window
    if num_sinks or softcap or not kv_starts is prefix_lens is head_windows is sink_logits is scale is None:
        options |= {
            "kv_starts": kv_starts, "num_sinks": num_sinks, "prefix_lens": prefix_lens, "head_windows": head_windows,
            "sink_logits": sink_logits, "softcap": softcap, "scale": scale,
        }  # fmt: skip
    if dispatches(q, k, v, sink_logits):
        out, lse = _attention(q, k, v, **options)
    else:
        with BelowAutograd():
            out, lse = _attention(q, k, v, **options)
    return (out, lse) if return_lse else out


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(  # type: ignore[misc]
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
    """:func:`attention` over a ragged batch: sequence b owns the rows from offset b to offset b + 1.

    Args:
        q: ``[N, H, D]``; k: ``[M, G, D]``; v: ``[M, G, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, ascending from 0. Rows of q past the last offset give
            out 0 and lse -inf; rows of k and v past it are never read.
        max_q_len, max_kv_len: host-side bounds of the lengths.

    The other options, results and errors are those of :func:`attention`; positions count within a sequence.
    """
    options: dict[str, object] = {
        "kv_starts": kv_starts, "causal": causal, "window": window or 0, "num_sinks": num_sinks,
        "prefix_lens": prefix_lens, "head_windows": head_windows, "sink_logits": sink_logits, "softcap": softcap,
        "scale": scale, "max_q_len": max_q_len, "max_kv_len": max_kv_len,
    }  # fmt: skip
    if dispatches(q, k, v, sink_logits):
        out, lse = _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    else:
        with BelowAutograd():
            out, lse = _varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return (out, lse) if return_lse else out


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Joins partial attention results over disjoint sets of keys into the result over their union.

    Args:
        outs: ``[P, ..., D]``, the partial outputs; lses: ``[P, ...]``, float32 (float64 for float64 outs).

    Returns:
        out ``[..., D]`` in outs' dtype and lse ``[...]``. A part with lse -inf is neutral; all of them: 0 and -inf.

    Differentiable. ``out = sum_p exp(lse_p - lse) out_p``, ``lse = log sum_p exp(lse_p)`` (FlashInfer,
    arXiv 2501.01005, section 2.2).
    """
    if dispatches(outs, lses):
        out, lse = _merge_states(outs, lses)
    else:
        with BelowAutograd():
            out, lse = _merge_states(outs, lses)
    return out, lse
