"""The pre-norm decoder layer of the Llama family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effops.cache import LayerCache, Step
from effops.nn.attention import Attention, Rope
from effops.nn.basic import MLP, RMSNorm


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(·)); norms and additions happen in the projections' own calls."""

    def __init__(
        self, self_attn: Attention, mlp: MLP, input_layernorm: RMSNorm, post_attention_layernorm: RMSNorm
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        step: Step | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """x [B,T,d] to [B,T,d], or to [B,keep,d]: the last ``keep`` tokens, for which the others give only keys and
        values."""
        own: Any = self._modules
        last = x if keep is None or keep >= x.shape[1] else x[:, x.shape[1] - keep :]
        x = own["self_attn"].forward(x, rope, cache, step, last, own["input_layernorm"], keep)
        return own["mlp"].forward(x, x, own["post_attention_layernorm"])
