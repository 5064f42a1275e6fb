"""The parts of a decoder layer around attention. Computed in float32 (float64 for float64), rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.reference.attention import attention
from effops.reference.cache import append_kv, paged_attention, tree_attention


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pack_weight(
    w: Tensor, format: str | None = None, *, group_size: int | None = None, symmetric: bool = True
) -> Tensor:
    """The weight [N,K] that the format leaves of w: in its dtype, or float32 for int8, int4 and fp8_e4m3."""
    formats = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if format is None:
        return w
    if format in ("int8", "int4", "fp8_e4m3"):
        return _quantized(w.float(), format, group_size, symmetric)
    if format not in formats:
        raise RuntimeError(f"pack_weight: format: expected one of {', '.join(formats)}, got {format!r}")
    return w.to(formats[format])


def _quantized(w: Tensor, format: str, group_size: int | None, symmetric: bool) -> Tensor:
    """Groups of ``group_size`` inputs (None: 128 for int4 where it divides K, else all) have one step: the largest size
    over 7, 127 or, of float8 numbers, 448; or the range with zero over 15 or 255 and a zero that is a whole number of
    steps. A step has 16 bits and is rounded up."""
    if w.shape[1] == 0:
        return w
    if group_size is None:
        group_size = 128 if format == "int4" and w.shape[1] % 128 == 0 else w.shape[1]
    most = {"int4": 7, "int8": 127, "fp8_e4m3": 448}[format]
    out = torch.zeros_like(w)
    for n in range(w.shape[0]):
        for first in range(0, w.shape[1], group_size):
            row = w[n, first : first + group_size]
            low, high = row.min().clamp(max=0), row.max().clamp(min=0)
            step = row.abs().max() / most if symmetric else (high - low) / (2 * most + 1)
            if step == 0:
                continue
            mantissa, exponent = torch.frexp(step)
            step = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
            lowest = -most if symmetric else int((low / step).round())
            numbers = row / step if format == "fp8_e4m3" else (row / step).round()
            numbers = numbers.clamp(lowest, lowest + (2 * most if symmetric else 2 * most + 1))
            if format == "fp8_e4m3":
                numbers = numbers.to(torch.float8_e4m3fn).float()
            out[n, first : first + group_size] = numbers * step
    return out


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
    activation: str | None = None,
) -> Tensor:
    """f(x) [...,K] · weight [N,K]ᵀ + bias [N] + residual [...,N]. ``weight`` may also offer ``dequantize()``.

    f is ``rms_norm(x, norm, norm_eps)``, ``silu_mul(x)`` where ``gated``, or nothing. ``activation`` "int8": f(x)
    becomes ``int8_rows(f(x), weight.group_size)``.
    """
    if norm is not None:
        x = rms_norm(x, norm, norm_eps)
    if gated:
        x = silu_mul(x)
    matrix = weight if isinstance(weight, Tensor) else weight.dequantize()
    rows = x if activation is None else int8_rows(x, weight.group_size)  # type: ignore[attr-defined]
    y = _widen(rows) @ matrix.to(_widen(rows).dtype).mT
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def int8_rows(x: Tensor, group_size: int) -> Tensor:
    """Each ``group_size`` values of the last dimension as -127 to 127 steps of their largest size over 127, a float32,
    rounded half to even; float64."""
    if x.numel() == 0:
        return x.double()
    groups = x.float().unflatten(-1, (-1, group_size))
    step = groups.abs().amax(-1, keepdim=True) / 127
    numbers = (groups / torch.where(step > 0, step, 1.0)).round().clamp(-127, 127)
    return (numbers.double() * step.double()).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + weight_offset) over the last dimension; x [...,D], weight [D]."""
    wide = _widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (_widen(weight) + weight_offset)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates the pairs (i, i + R/2) of the first R dimensions of x [B,T,H,D]; the rest passes through.

    cos, sin [P,R/2] hold one row a position; positions int32 [B,T].
    """
    half = cos.shape[1]
    c, s = (table[positions.long()][:, :, None, :].to(_widen(x).dtype) for table in (cos, sin))
    a, b = _widen(x[..., :half]), _widen(x[..., half : 2 * half])
    return torch.cat([(a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), x[..., 2 * half :]], -1)


def rotary_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    page_table: Tensor | None = None,
) -> Tensor:
    """Turns the query and key heads of qkv [B,T,H+2G,D], appends keys and values, returns the queries [B,T,H,D]."""
    kv_heads = k_cache.shape[2]
    q, k, v = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    append_kv(k_cache, v_cache, rotary(k, cos, sin, positions), v, slots, page_table=page_table)
    return rotary(q, cos, sin, positions)


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[..., :f]) · x[..., f:] of x [...,2f]: the gated unit of a fused gate and up projection."""
    gate, up = _widen(x).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


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
    """A pre-norm decoder layer x [B,T,d] -> [B,T,d] over a cache [B,L,G,D] or pages, which it writes at ``slots``;
    causal, or under the tree mask of ``ancestors``."""
    heads = packed_linear(x, qkv, qkv_bias, norm=attention_norm, norm_eps=norm_eps)
    heads = heads.unflatten(2, (-1, k_cache.shape[3]))
    q = rotary_append(heads, cos, sin, positions, k_cache, v_cache, slots, page_table=page_table)
    if ancestors is not None:
        mixed = tree_attention(
            q, k_cache, v_cache, ancestors, depths=depths, kv_lens=kv_lens, page_table=page_table, window=window
        )
    elif page_table is not None:
        mixed = paged_attention(q, k_cache, v_cache, page_table, kv_lens, causal=True, window=window)
    else:
        mixed = attention(q, k_cache, v_cache, kv_lens=kv_lens, causal=True, window=window, max_kv_len=max_kv_len)
    assert isinstance(mixed, Tensor)
    y = packed_linear(mixed.flatten(2), o, o_bias, residual=x)
    hidden = packed_linear(y, gate_up, gate_up_bias, norm=mlp_norm, norm_eps=norm_eps)
    return packed_linear(hidden, down, down_bias, residual=y, gated=True)


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
    """tokens [B,T] through embedding [V,d], ``decoder_layer`` for each layer in turn, over layer i of the caches
    [layers,...], and ``norm`` [d] to hidden states [B,T,d], and these through lm_head [V,d] to logits [B,T,V]; an empty
    list of biases is none."""
    x = embedding[tokens]
    lists = attention_norm, qkv, qkv_bias, o, o_bias, mlp_norm, gate_up, gate_up_bias, down, down_bias
    for i, window in enumerate(windows):
        own: Any = (
            *(each[i] if each else None for each in lists), cos, sin, positions, k_cache[i], v_cache[i], slots, kv_lens,
            norm_eps, window, max_kv_len,
        )  # fmt: skip
        keywords: Any = {"page_table": page_table, "ancestors": ancestors, "depths": depths}
        x = decoder_layer(*(x, *own), **keywords)
    hidden = rms_norm(x, norm, norm_eps)
    return hidden, packed_linear(hidden, lm_head)
