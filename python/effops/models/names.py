"""Where a decoder's weights are under their Hugging Face names.

Values are views of the weights' memory, so that loading writes into them; fused weights appear as their parts.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from effops.models.config import ModelConfig
from effops.nn import MLP, Attention, DecoderLayer, LatentAttention, Linear, MoE


def layer_tensors(layer: DecoderLayer, config: ModelConfig, prefix: str, stored: Collection[str]) -> dict[str, Tensor]:
    """One layer's weights; ``stored`` are the names of a checkpoint, which decide where several are known."""
    named: dict[str, Tensor] = {}
    if isinstance(layer.self_attn, LatentAttention):
        named |= _latent(layer.self_attn, f"{prefix}self_attn.")
    else:
        named |= _attention(layer.self_attn, f"{prefix}self_attn.")
    if isinstance(layer.mlp, MoE):
        named |= _moe(layer.mlp, config.model_type, prefix, stored)
    else:
        named |= _mlp(layer.mlp, f"{prefix}mlp.")
    named[f"{prefix}input_layernorm.weight"] = layer.input_layernorm.weight
    named[f"{prefix}post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
    return named


def _parts(linear: Linear, prefix: str, rows: dict[str, int]) -> dict[str, Tensor]:
    """A fused projection as the projections that its rows are."""
    named: dict[str, Tensor] = {}
    for kind, whole in linear.named_parameters():
        parts = whole.detach().split(list(rows.values()))
        named |= {f"{prefix}{name}.{kind}": part for name, part in zip(rows, parts, strict=True)}
    return named


def _whole(linear: Linear, name: str) -> dict[str, Tensor]:
    return {f"{name}.{kind}": weight for kind, weight in linear.named_parameters()}


def _mlp(mlp: MLP, prefix: str) -> dict[str, Tensor]:
    size = int(mlp.down_proj.weight.shape[1])
    named = _parts(mlp.gate_up_proj, prefix, {"gate_proj": size, "up_proj": size})
    return named | _whole(mlp.down_proj, f"{prefix}down_proj")


def _attention(attention: Attention, prefix: str) -> dict[str, Tensor]:
    q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    named = _parts(attention.qkv_proj, prefix, {"q_proj": q, "k_proj": kv, "v_proj": kv})
    named |= _whole(attention.o_proj, f"{prefix}o_proj")
    if attention.q_norm is not None and attention.k_norm is not None:
        named |= {f"{prefix}q_norm.weight": attention.q_norm.weight, f"{prefix}k_norm.weight": attention.k_norm.weight}
    return named


def _latent(attention: LatentAttention, prefix: str) -> dict[str, Tensor]:
    query = "q_proj"
    named: dict[str, Tensor] = {}
    if attention.q_a_proj is not None and attention.q_a_layernorm is not None:
        query = "q_b_proj"
        named |= _whole(attention.q_a_proj, f"{prefix}q_a_proj")
        named[f"{prefix}q_a_layernorm.weight"] = attention.q_a_layernorm.weight
    named |= _whole(attention.q_proj, f"{prefix}{query}")
    named |= _whole(attention.kv_a_proj, f"{prefix}kv_a_proj_with_mqa")
    named[f"{prefix}kv_a_layernorm.weight"] = attention.kv_a_layernorm.weight
    named |= _whole(attention.kv_b_proj, f"{prefix}kv_b_proj")
    return named | _whole(attention.o_proj, f"{prefix}o_proj")


def _moe(moe: MoE, kind: str, prefix: str, stored: Collection[str]) -> dict[str, Tensor]:
    """One tensor an expert and projection, or all experts' in two tensors, as Transformers 5 holds them in memory."""
    old_mixtral = kind == "mixtral" and f"{prefix}mlp.gate.weight" not in stored
    block = f"{prefix}block_sparse_moe." if old_mixtral else f"{prefix}mlp."
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    named: dict[str, Tensor] = {f"{block}gate.weight": moe.router.weight}
    if moe.router.selection_bias is not None:
        named[f"{block}gate.e_score_correction_bias"] = moe.router.selection_bias
    if moe.w_gate_up is None or moe.w_down is None:
        return named | _shared(moe, kind, block)  # experts in panels: packed_checkpoint.py
    gate_up, w_down = moe.w_gate_up.detach(), moe.w_down.detach()
    if f"{block}experts.gate_up_proj" in stored:
        named |= {f"{block}experts.gate_up_proj": gate_up, f"{block}experts.down_proj": w_down}
    else:
        for i, (gate_and_up, last) in enumerate(zip(gate_up, w_down, strict=True)):
            first, second = gate_and_up.chunk(2)
            expert = f"{block}experts.{i}."
            named |= {f"{expert}{gate}.weight": first, f"{expert}{up}.weight": second, f"{expert}{down}.weight": last}
    return named | _shared(moe, kind, block)


def _shared(moe: MoE, kind: str, block: str) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    if moe.shared is not None:
        named |= _mlp(moe.shared, f"{block}shared_expert{'s' if kind.startswith('deepseek') else ''}.")
    if moe.shared_gate is not None:
        named |= _whole(moe.shared_gate, f"{block}shared_expert_gate")
    return named


def row_orders(config: ModelConfig) -> dict[str, Tensor]:
    """For the names whose rows a checkpoint has in another order, where each of its rows is in our weight, int64.

    Hugging Face's latent attention has the rotated features of a head last, and alternates the two that turn
    together; ours come first, in halves.
    """
    latent = config.latent
    if latent is None:
        return {}
    rotated, plain = latent.qk_rope_head_dim, latent.qk_nope_head_dim
    turn = torch.arange(rotated)
    if latent.rope_interleave:
        turn = turn.view(2, -1).T.reshape(-1)
    head = torch.cat([torch.arange(rotated, rotated + plain), turn])
    heads = torch.arange(config.num_attention_heads)[:, None] * (rotated + plain)
    queries = (heads + head).flatten()
    keys = torch.cat([torch.arange(latent.kv_lora_rank), latent.kv_lora_rank + turn])
    orders: dict[str, Tensor] = {}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn."
        orders[f"{prefix}{'q_proj' if latent.q_lora_rank is None else 'q_b_proj'}.weight"] = queries
        orders |= {f"{prefix}kv_a_proj_with_mqa.{kind}": keys for kind in ("weight", "bias")}
    return orders
