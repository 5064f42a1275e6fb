"""Shapes of well-known models, for runs with random weights."""

from __future__ import annotations

from effops.models.config import ModelConfig


def qwen2_0_5b(max_position_embeddings: int = 32768) -> ModelConfig:
    """The shape of Qwen2-0.5B (0.49 billion parameters; its published configuration)."""
    return ModelConfig(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attention_bias=True,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
