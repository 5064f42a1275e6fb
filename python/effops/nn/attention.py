"""Grouped-query self-attention with a fused query-key-value projection."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effops import ops
from effops.cache import LayerCache, Step
from effops.nn import functional
from effops.nn.basic import Linear, RMSNorm


class Rope(NamedTuple):
    """What rotates one forward pass: cos, sin float32 [P,R/2] and positions int32 [B,T]."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


class Attention(nn.Module):
    """Causal self-attention: x [B,T,d] to [B,T,d], plus the residual.

    The rows of ``qkv_proj`` are the H query heads, then the G key heads, then the G value heads.
    ``qk_norm_eps`` turns on an RMSNorm of each query and key head before the rotation, or of all query heads and all
    key heads at once where ``qk_norm_whole`` (OLMoE). ``clip`` bounds queries, keys and values after that. ``window``
    None means every earlier key.
    """

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_whole: bool = False,
        clip: float | None = None,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: num_heads: expected a multiple of num_kv_heads ({num_kv_heads}), got {num_heads}"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.window, self.clip = head_dim, window, clip
        self.total_heads, self.qk_norm_whole = num_heads + 2 * num_kv_heads, qk_norm_whole
        self.qkv_proj = Linear(hidden_size, self.total_heads * head_dim, bias=bias, dtype=dtype, device=device)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=out_bias, dtype=dtype, device=device)
        for name, heads in (("q_norm", num_heads), ("k_norm", num_kv_heads)):
            size = head_dim * heads if qk_norm_whole else head_dim
            norm = None if qk_norm_eps is None else RMSNorm(size, qk_norm_eps, dtype=dtype, device=device)
            self.register_module(name, norm)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        step: Step | None = None,
        residual: Tensor | None = None,
        norm: RMSNorm | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """Attends to the new tokens of x, or of norm(x), and, with a cache, to what it holds; new keys are written
        there first. ``keep`` asks for the last so many tokens' outputs only; ``residual`` is then theirs."""
        own: Any = self._modules
        batch, tokens, _ = x.shape
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = own["qkv_proj"].forward(x, None, norm).view(batch, tokens, self.total_heads, self.head_dim)
        if cache is not None and step is not None and own["q_norm"] is None and self.clip is None:
            q = cache.rotary_append(qkv, rope.cos, rope.sin, step)
        else:
            q, k, v = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), 2)
            if own["q_norm"] is not None and self.qk_norm_whole:
                q = own["q_norm"].forward(q.flatten(2)).view(q.shape)
                k = own["k_norm"].forward(k.flatten(2)).view(k.shape)
            elif own["q_norm"] is not None:
                q, k = own["q_norm"].forward(q), own["k_norm"].forward(k)
            if self.clip is not None:
                q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
            q, k = functional.rotary(q, *rope), functional.rotary(k, *rope)
            if cache is not None and step is not None:
                cache.append(k, v, step)
        first = 0 if keep is None or keep >= tokens or (step is not None and step.tree is not None) else tokens - keep
        whole = cache is not None and cache.needs_queries
        if first and not whole:
            q = q[:, first:]
        if cache is None or step is None:
            out = ops.attention(q, k, v, causal=True, window=self.window)
        else:
            out = cache.attend(q, step, window=self.window)
            if first and whole:
                out = out[:, first:]
        return own["o_proj"].forward(out.flatten(2), residual)
