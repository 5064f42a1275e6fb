"""Tiny random models in the Transformers library, one for every switch of a family's configuration."""

from __future__ import annotations

import pytest
import torch

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,  # or its embedding has no gradient there
}


def rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **fields}}


QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
DEEPSEEK = {
    "num_key_value_heads": 6,
    "head_dim": 4,  # of the rotated features
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
}

CONFIGS = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-wide-heads": ("llama", {"head_dim": 20, "num_key_value_heads": 1}),
    "llama-rope-linear": ("llama", rope("linear", factor=4.0)),
    "llama-rope-dynamic": ("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    "llama-rope-llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-rope-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-rope-yarn-mscale": (
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.8,
            mscale_all_dim=0.5,
            truncate=False,
            beta_fast=16.0,
        ),
    ),
    "llama-rope-longrope": (
        "llama",
        rope(
            "longrope",
            factor=4.0,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            original_max_position_embeddings=16,
        ),
    ),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-some-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 40}),
    "qwen2_moe-dense-layers": (
        "qwen2_moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE),
    "qwen3_moe-window": (
        "qwen3_moe",
        {
            **QWEN_MOE,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": None}),
    "olmoe-clipped": (
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.8, "norm_topk_prob": True, "attention_bias": True},
    ),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 1}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "q_lora_rank": 10,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=0.5),
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": 10, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2},
    ),
    "deepseek_v3-halves": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
}


@pytest.fixture(params=CONFIGS)
def peer(request):
    """A Transformers model whose weights, biases and norms are large enough for every part to show."""
    transformers = pytest.importorskip("transformers", reason="transformers is the peer of these tests")
    family, changes = CONFIGS[request.param]
    fields = dict(BASE)
    if family in ("qwen2", "qwen2_moe", "olmoe"):  # their configurations have no head_dim
        del fields["head_dim"]
    config = transformers.AutoConfig.for_model(family, **{**fields, **changes})
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sorted(CONFIGS).index(request.param))
    with torch.no_grad():
        buffers = [(name, b) for name, b in model.named_buffers() if name.endswith("correction_bias")]
        for name, p in [*model.named_parameters(), *buffers]:
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.25, generator=generator)
    return model
