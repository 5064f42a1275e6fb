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
}


def rope(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **fields}}


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
}


@pytest.fixture(params=CONFIGS)
def peer(request):
    """A Transformers model whose weights, biases and norms are large enough for every part to show."""
    transformers = pytest.importorskip("transformers", reason="transformers is the peer of these tests")
    family, changes = CONFIGS[request.param]
    fields = dict(BASE)
    if family == "qwen2":  # its configuration has no head_dim
        del fields["head_dim"]
    config = transformers.AutoConfig.for_model(family, **{**fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(sorted(CONFIGS).index(request.param))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.25, generator=generator)
    return model
