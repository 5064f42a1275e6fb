"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with keys and values expanded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effops import ops
from effops.cache import LayerCache, Step
from effops.nn import functional
from effops.nn.attention import Rope
from effops.nn.basic import Linear, RMSNorm


class LatentAttention(nn.Module):
    """Causal self-attention of x [B,T,d] whose keys and values come from a latent of ``kv_rank`` features a token, plus
    the residual.

    H query heads attend to H key heads of ``rope_dim + nope_dim`` features and value heads of ``value_dim``. Each
    head's first ``rope_dim`` features are rotated (halves, as :class:`Attention` does); a key's are the same in all
    heads. ``q_rank`` None projects queries directly. Caches hold the expanded keys and values. ``scale`` multiplies
    the scores; None: 1 / sqrt(rope_dim + nope_dim).
    """

    q_a_proj: Linear | None
    q_a_layernorm: RMSNorm | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_rank: int | None,
        kv_rank: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        bias: bool = False,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, norm_eps, dtype=dtype, device=device)

        self.num_heads, self.rope_dim, self.nope_dim = num_heads, rope_dim, nope_dim
        self.kv_rank, self.value_dim = kv_rank, value_dim
        self.head_dim = rope_dim + nope_dim
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.register_module("q_a_proj", None if q_rank is None else linear(hidden_size, q_rank, bias))
        self.register_module("q_a_layernorm", None if q_rank is None else norm(q_rank))
        self.q_proj = linear(hidden_size if q_rank is None else q_rank, num_heads * self.head_dim)
        self.kv_a_proj = linear(hidden_size, kv_rank + rope_dim, bias)
        self.kv_a_layernorm = norm(kv_rank)
        self.kv_b_proj = linear(kv_rank, num_heads * (nope_dim + value_dim))
        self.o_proj = linear(num_heads * value_dim, hidden_size, bias)

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
        """As :meth:`Attention.forward`."""
        batch, tokens, _ = x.shape
        x = x if norm is None else norm.forward(x)
        if self.q_a_proj is None or self.q_a_layernorm is None:
            q = self.q_proj.forward(x)
        else:
            q = self.q_proj.forward(self.q_a_proj.forward(x), None, self.q_a_layernorm)
        q = functional.rotary(q.view(batch, tokens, self.num_heads, self.head_dim), *rope)
        latent, k_rope = self.kv_a_proj.forward(x).split([self.kv_rank, self.rope_dim], -1)
        k_rope = functional.rotary(k_rope.unsqueeze(2), *rope)
        kv = self.kv_b_proj.forward(latent, None, self.kv_a_layernorm)
        k_nope, v = kv.view(batch, tokens, self.num_heads, -1).split([self.nope_dim, self.value_dim], -1)
        k = torch.cat([k_rope.expand(-1, -1, self.num_heads, -1), k_nope], -1)
        if cache is not None and step is not None:
            cache.append(k, v, step)
        first = 0 if keep is None or keep >= tokens or (step is not None and step.tree is not None) else tokens - keep
        whole = cache is not None and cache.needs_queries
        if first and not whole:
            q = q[:, first:]
        if cache is None or step is None:
            out = ops.attention(q, k, v, causal=True, scale=self.scale)
            assert isinstance(out, Tensor)
        else:
            out = cache.attend(q, step, scale=self.scale)
            if first and whole:
                out = out[:, first:]
        return self.o_proj.forward(out.flatten(2), residual)
