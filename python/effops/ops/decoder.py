"""A decoder layer, or a whole decoder, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowADInplaceOrView, increment_version, is_compiling, tracks_grad
from effops.ops._invariance import is_batch_invariant

_decoder = torch.ops.effops.decoder.default
_decoder_layer = torch.ops.effops.decoder_layer.default


def decoder_layer(
    x: Tensor,
    attention_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    o: Tensor,
    o_bias: Tensor | None,
    mlp_norm: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    norm_eps: float = 1e-6,
    window: int = 0,
    max_kv_len: int | None = None,
    *,
    page_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    depths: Tensor | None = None,
) -> Tensor:
    """A pre-norm layer of the Llama family over a cache: what its ops do one after the other, with the same bits.

    ::

        h = packed_linear(x, qkv, qkv_bias, norm=attention_norm)
        q = rotary_append(h, cos, sin, positions, k_cache, v_cache, slots)
        y = packed_linear(attention(q, k_cache, v_cache, kv_lens=kv_lens, causal=True), o, o_bias, residual=x)
        h = packed_linear(y, gate_up, gate_up_bias, norm=mlp_norm)
        return packed_linear(h, down, down_bias, residual=y, gated=True)

    One call costs as much as one of the five, which is what a decode step of a small model mostly consists of.

    Args:
        x: ``[B, T, d]``, float32, bfloat16, float16 or float64; all weights, biases and caches have its dtype.
        qkv: ``[(H + 2G) D, d]``, rows of query, key and value heads; o: ``[d, H D]``; gate_up: ``[2f, d]``, gate rows
            first; down: ``[d, f]``; norms: ``[d]``.
        cos, sin: float32 ``[P, R/2]``; positions: int32 ``[B, T]``.
        k_cache, v_cache: ``[B, L, G, D]``, written in place; slots: int32 ``[B, T]``; kv_lens: int32 ``[B]``, the new
            tokens included. All indices are checked before anything is written.
        window: visible keys to the left; 0: all. max_kv_len: host-side bound of ``kv_lens``.
        page_table: int32 ``[B, entries]``: the caches are pages, as in :func:`paged_attention`.
        ancestors, depths: the T tokens are a tree, as in :func:`tree_attention`, rather than consecutive.

    Returns:
        ``[B, T, d]``. No gradient: raises where one is asked for.
    """
    arguments: tuple[Any, ...] = (
        x, attention_norm, qkv, qkv_bias, o, o_bias, mlp_norm, gate_up, gate_up_bias, down, down_bias, cos, sin,
        positions, k_cache, v_cache, slots, kv_lens, norm_eps, window, max_kv_len,
    )  # fmt: skip
    invariant = is_batch_invariant()
    if page_table is not None or ancestors is not None or depths is not None or invariant:  # what is off is not passed
        arguments = (*arguments, page_table, ancestors, depths, invariant)
    if is_compiling() or (torch.is_grad_enabled() and tracks_grad(*(t for t in arguments if isinstance(t, Tensor)))):
        return _decoder_layer(*arguments)
    with BelowADInplaceOrView():
        out = _decoder_layer(*arguments)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache))
    return out


def decoder(
    tokens: Tensor,
    embedding: Tensor,
    attention_norm: Sequence[Tensor],
    qkv: Sequence[Tensor],
    qkv_bias: Sequence[Tensor],
    o: Sequence[Tensor],
    o_bias: Sequence[Tensor],
    mlp_norm: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    norm: Tensor,
    lm_head: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    windows: Sequence[int],
    norm_eps: float = 1e-6,
    max_kv_len: int | None = None,
    *,
    page_table: Tensor | None = None,
    ancestors: Tensor | None = None,
    depths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A forward pass of the Llama family over a cache, from tokens to logits, with the bits of its ops: a step of a
    small model is one call instead of dozens.

    The rows of ``embedding`` that the tokens name, :func:`decoder_layer` for one layer after the other, ``rms_norm``,
    ``packed_linear``.

    Args:
        tokens: int64 ``[B, T]``.
        embedding, lm_head: ``[V, d]`` each; norm: ``[d]``. Their dtype is that of all weights and caches.
        attention_norm to down_bias: a tensor a layer each, as in :func:`decoder_layer`; biases may be empty lists, for
            none.
        k_cache, v_cache: ``[layers, B, L, G, D]``, or ``[layers, P, page, G, D]`` beside a page table, written in
            place. Everything is checked before anything is written.
        windows: of each layer; 0: all keys.
        cos, sin, positions, slots, kv_lens, norm_eps, max_kv_len, page_table, ancestors, depths: shared by the layers,
            as in :func:`decoder_layer`.

    Returns:
        What the LM head reads, ``[B, T, d]``, and the logits, ``[B, T, V]``. No gradient: raises where one is asked
        for.
    """
    lists = attention_norm, qkv, qkv_bias, o, o_bias, mlp_norm, gate_up, gate_up_bias, down, down_bias
    arguments: tuple[Any, ...] = (
        tokens, embedding, *lists, norm, lm_head, cos, sin, positions, k_cache, v_cache, slots, kv_lens, windows,
        norm_eps, max_kv_len,
    )  # fmt: skip
    invariant = is_batch_invariant()
    if page_table is not None or ancestors is not None or depths is not None or invariant:  # what is off is not passed
        arguments = (*arguments, page_table, ancestors, depths, invariant)
    if is_compiling() or (
        torch.is_grad_enabled()
        and tracks_grad(*(t for t in arguments if isinstance(t, Tensor)), *(t for one in lists for t in one))
    ):
        return _decoder(*arguments)
    with BelowADInplaceOrView():
        result = _decoder(*arguments)
    if not k_cache.is_inference():
        increment_version((k_cache, v_cache))
    return result
