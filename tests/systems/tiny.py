"""A configuration that is quick to run, with the shipped model's vocabulary."""

from __future__ import annotations

from effops.models import ModelConfig

TINY = ModelConfig(
    model_type="llama", vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=160,
)  # fmt: skip
