"""How far a correct gradient of attention may lie from the exact one; notation as in :mod:`effops.reference.bounds`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.reference.attention import _per_sequence, attention
from effops.reference.bounds import (
    FLUSH,
    ROUNDOFF,
    Interval,
    _chain,
    _compute_roundoff,
    _interval,
    _smallest,
    attention_bound,
)  # fmt: skip


def attention_gradient_bound(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rounded_weights: bool = False,
    **options: Any,
) -> dict[str, Interval]:
    """Gradients of ``attention`` by name (q, k, v and, if given, sink_logits) for d_out [B,T,H,Dv], d_lse [B,T,H].

    For a backward pass that recomputes the weights from out and lse, as in FlashAttention-2 (arXiv 2307.08691):

    - p = exp(s - lse): the error of s is part of lse's bound, so that p is right up to e = expm1(2 lse_error) relative;
    - dP = <dO, v> and delta = <dO, out> - dlse have absolute sums a = <|dO|,|v|> + <|dO|,|out|> + |dlse| and chains of
      Dv roundings; out itself is off by its bound (twice <|dO|, out_error>, for 1 + e <= 2);
    - the slope of the softcap, 1 - (s / cap)^2, is off by at most 2 lse_error / cap;
    - dS = p (dP - delta) slope scale is then off by p scale (a kappa + 2 <|dO|, out_error>); dq, dk and dv are sums of
      such terms over keys or rows, rounded to the dtype at the end.

    ``rounded_weights``: p and dS are rounded to a 16-bit dtype before the products that sum them, as tensor cores ask.
    """
    u, w = ROUNDOFF[q.dtype], _compute_roundoff(q.dtype)
    batch, tokens, heads, head_dim = q.shape
    capacity, kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[3]
    group, scale = heads // kv_heads, abs(head_dim**-0.5 if options.get("scale") is None else options["scale"])

    ends = _per_sequence(options.get("kv_lens"), capacity, batch, q.device)
    starts = _per_sequence(options.get("kv_starts"), 0, batch, q.device)
    j = torch.arange(capacity, device=q.device)
    exists = ((starts[:, None] <= j) & (j < ends[:, None]))[:, :, None, None]
    leaves = [x.detach().to(torch.float64) for x in (q, torch.where(exists, k, 0), torch.where(exists, v, 0))]
    q64, k64, v64 = (x.requires_grad_() for x in leaves)
    sinks = options.get("sink_logits")
    if sinks is not None:
        sinks = sinks.detach().to(torch.float64).requires_grad_()
    exact_options = {**options, "sink_logits": sinks}
    do, dl = d_out.to(torch.float64), torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
    if d_lse is not None:
        dl = d_lse.to(torch.float64)
    out, lse = attention(q64, k64, v64, **{**exact_options, "return_lse": True})
    named = {"q": q64, "k": k64, "v": v64} | ({} if sinks is None else {"sink_logits": sinks})
    loss = (out * do).sum() + (torch.where(lse.isfinite(), lse, 0.0) * dl).sum()
    exact = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    with torch.no_grad():
        one_hot = torch.eye(capacity, dtype=torch.float64, device=q.device)[None, :, None, :]
        p = attention(q64, k64, one_hot.expand(batch, -1, kv_heads, -1), **{**exact_options, "return_lse": True})[0]
        p = p + FLUSH  # [B,T,H,L]
        out_bound, lse_bound = attention_bound(q, k, v, **options)
        do_abs, off = do.abs(), (do.abs() * out_bound.error).sum(-1)
        delta = (do_abs * out.abs()).sum(-1) + dl.abs()
        k_abs, v_abs = (x.abs().repeat_interleave(group, 2) for x in (k64, v64))
        a = torch.einsum("bthd,blhd->bthl", do_abs, v_abs) + delta[..., None]
        weight = torch.expm1(2 * lse_bound.error)[..., None]
        slope = 2 * lse_bound.error[..., None] / options["softcap"] + 8 * w if options.get("softcap") else 0.0
        narrow = rounded_weights and q.dtype in (torch.bfloat16, torch.float16)
        up = u if narrow else 0.0
        least = _smallest(q.dtype) if narrow else 0.0
        kappa = (1 + weight) * (1 + _chain(v_dim + 8, w)) * (1 + slope) * (1 + up) - 1
        size = scale * p * a
        error = size * kappa + 2 * scale * p * off[..., None] * (1 + up) + scale * least

        def over_keys(x: Tensor) -> Tensor:
            return torch.einsum("bthl,blhd->bthd", x, k_abs)

        def over_rows(x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("bthl,bthd->blhd", x, y).unflatten(2, (kv_heads, group)).sum(3)

        def rounded(name: str, sums: Tensor, terms: int, magnitude: Tensor) -> Interval:
            total = sums + _chain(terms + 2, w) * (magnitude + sums)
            total = total + u * (exact[name].abs() + total) + _smallest(q.dtype)
            return _interval(exact[name], total, q.dtype)

        rows = tokens * group
        do_size = over_rows(p, do_abs)
        bounds = {
            "q": rounded("q", over_keys(error), capacity, over_keys(size)),
            "k": rounded("k", over_rows(error, q64.abs()), rows, over_rows(size, q64.abs())),
            "v": rounded("v", over_rows(p * ((1 + weight) * (1 + up) - 1) + least, do_abs), rows, do_size),
        }
        if sinks is not None:
            p_sink = torch.where(lse.isfinite(), torch.exp(sinks - lse), 0.0)
            size_sink = (p_sink * delta).sum((0, 1))
            off_sink = (p_sink * (delta * kappa[..., 0] + 2 * off)).sum((0, 1))
            total = off_sink + (_chain(batch * tokens + 2, w) + ROUNDOFF[torch.float32]) * (size_sink + off_sink)
            bounds["sink_logits"] = _interval(exact["sink_logits"], total + FLUSH, q.dtype)
    return bounds
