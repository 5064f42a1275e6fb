"""The pre-norm decoder layer of the Llama family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effops import ops
from effops.cache import DenseLayer, LayerCache, PagedLayer, Step
from effops.nn.attention import Attention, Rope
from effops.nn.basic import MLP, RMSNorm
from effops.nn.functional import has_fused_layers
from effops.nn.latent import LatentAttention
from effops.nn.moe import MoE
from effops.nn.packed import places_of


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(·)); norms and additions happen in the projections' own calls.

    Over a dense or paged cache and without gradients the layer is one op, ``decoder_layer``, unless one of its parts
    was replaced; the bits are the same.
    """

    self_attn: Any  # Attention or LatentAttention
    mlp: Any  # MLP or MoE

    def __init__(
        self,
        self_attn: Attention | LatentAttention,
        mlp: MLP | MoE,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
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
        if keep is None or keep >= x.shape[1]:
            if (
                (type(cache) is DenseLayer or type(cache) is PagedLayer)
                and step is not None
                and not torch.is_grad_enabled()
                and has_fused_layers(x)
            ):
                weights = self._weights()
                if weights is not None and x.dtype is not torch.float64:
                    arguments: Any = (
                        *weights, *rope, cache.k, cache.v, step.slots, step.kv_lens, own["input_layernorm"].eps,
                        own["self_attn"].window or 0, step.max_kv_len,
                    )  # fmt: skip
                    if step.tree is not None:
                        tree = step.tree
                        return ops.decoder_layer(
                            x, *arguments, page_table=step.page_table, ancestors=tree.ancestors, depths=tree.depths
                        )
                    return ops.decoder_layer(x, *arguments, page_table=step.page_table)
            last = x
        else:
            last = x[:, x.shape[1] - keep :]
        x = own["self_attn"].forward(x, rope, cache, step, last, own["input_layernorm"], keep)
        return own["mlp"].forward(x, x, own["post_attention_layernorm"])

    def _weights(self) -> tuple[Tensor | None, ...] | None:
        """The weights in ``ops.decoder_layer``'s order; None where a part is not the plain module of this package or
        the op has no such step."""
        own: Any = self._modules
        attention, mlp = own["self_attn"], own["mlp"]
        norm1, norm2 = own["input_layernorm"], own["post_attention_layernorm"]
        if not (type(attention) is Attention and type(mlp) is MLP and type(norm1) is RMSNorm is type(norm2)):
            return None
        inner, outer = attention._modules, mlp._modules
        qkv, o, gate_up, down = inner["qkv_proj"], inner["o_proj"], outer["gate_up_proj"], outer["down_proj"]
        if inner["q_norm"] is not None or attention.clip is not None or norm1.eps != norm2.eps:
            return None
        places = [places_of(linear) for linear in (qkv, o, gate_up, down)]
        if None in places:
            return None
        q, a, g, d = ([where[name] for where, name in each or ()] for each in places)
        return (norm1._parameters["weight"], *q, *a, norm2._parameters["weight"], *g, *d)
