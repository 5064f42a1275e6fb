"""The pre-norm decoder layer of the Llama family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effops.cache import LayerCache, Step
from effops.nn.attention import Attention, Rope
from effops.nn.basic import MLP, RMSNorm


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(·)); both additions happen in the output projections."""

    def __init__(
        self, self_attn: Attention, mlp: MLP, input_layernorm: RMSNorm, post_attention_layernorm: RMSNorm
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None = None, step: Step | None = None) -> Tensor:
        own: Any = self._modules
        x = own["self_attn"].forward(own["input_layernorm"].forward(x), rope, cache, step, x)
        return own["mlp"].forward(own["post_attention_layernorm"].forward(x), x)
