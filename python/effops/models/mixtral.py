"""Decoders with mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3."""

from __future__ import annotations

from typing import Any, ClassVar

from effops.models.llama import Llama
from effops.models.moe_config import MOE_DEFAULTS
from effops.nn import MLP, Attention, LatentAttention, MoE


class Mixtral(Llama):
    """:class:`Llama` with experts (``config.experts``) in place of the MLPs, and latent attention (``config.latent``)
    where DeepSeek has it; its caches hold expanded keys and values.

    Loads one tensor an expert and projection (any published checkpoint), or all experts' in one (what Transformers 5
    writes with ``save_original_format=False``); writes the former.
    """

    families: ClassVar[tuple[str, ...]] = tuple(MOE_DEFAULTS)

    def _attention(self, window: int | None, **place: Any) -> Attention | LatentAttention:
        c = self.config
        if c.latent is None:
            return super()._attention(window, **place)
        return LatentAttention(
            c.hidden_size,
            c.num_attention_heads,
            q_rank=c.latent.q_lora_rank,
            kv_rank=c.latent.kv_lora_rank,
            rope_dim=c.latent.qk_rope_head_dim,
            nope_dim=c.latent.qk_nope_head_dim,
            value_dim=c.latent.v_head_dim,
            bias=c.attention_bias,
            scale=c.latent.score_scale(c.rope_parameters),
            **place,
        )

    def pack_experts_(self, format: str | None = None, **groups: Any) -> Mixtral:
        """:meth:`effops.nn.MoE.pack_` of every layer: faster on CPU, for inference alone."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.pack_(format, **groups)
        return self

    def _mlp(self, layer: int, **place: Any) -> MLP | MoE:
        c, experts = self.config, self.config.experts
        if experts is None or layer in experts.dense_layers:
            return super()._mlp(layer, **place)
        return MoE(
            c.hidden_size,
            experts.intermediate_size,
            experts.num_experts,
            experts.experts_per_token,
            shared_size=experts.shared_size,
            shared_gate=experts.shared_gate,
            **experts.router_options(),
            **place,
        )
