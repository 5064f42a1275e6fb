"""Models' sizes: those of transformers' own models, and what is not modelled is refused where it would matter."""

from __future__ import annotations

import json

import pytest
import torch
from effops.pim import ModelShape

BASE = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100, "intermediate_size": 96,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "model_type",
    ["codegen", "persimmon", "nemotron", "gpt2", "bloom", "biogpt", "llama", "qwen2", "qwen3_moe", "olmoe"],
)
def test_as_many_weights_as_the_model_has(model_type: str) -> None:
    """Without a gate a feed-forward layer has two matrices, not three."""
    transformers = pytest.importorskip("transformers", reason="the models are transformers'")
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 500}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    for name, value in {"intermediate_size": 1024, "num_key_value_heads": 8, "head_dim": 32, "rotary_dim": 32}.items():
        if hasattr(config, name) and model_type not in ("gpt2", "bloom"):
            setattr(config, name, value)
    m = ModelShape.load(config.to_dict())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = ("embed", "wte", "wpe", "lm_head")
    layers = sum(p.numel() for name, p in model.named_parameters() if not any(n in name for n in names))
    attention = (2 * m.heads + 2 * m.kv_heads) * m.head_dim * m.hidden
    ffn = m.ffn_matrices * m.hidden * m.intermediate * (m.experts or 1)
    assert layers == pytest.approx(m.layers * (attention + ffn), rel=0.06)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attn_layer_period": 8}, "attn_layer_period: expected 1, attention in every layer, got 8"),
        ({"mamba_d_state": 16}, "mamba_d_state: expected none, which is not modelled, got 16"),
        ({"moe_num_experts": 64}, "moe_num_experts: expected none, which is not modelled, got 64"),
        (
            {**EXPERTS, "decoder_sparse_step": 2},
            "moe_intermediate_size: expected intermediate_size (96) where one layer of 2 has experts, got 32",
        ),
        ({**EXPERTS, "mlp_only_layers": [0]}, "mlp_only_layers: expected none beside experts, got [0]"),
        ({"sliding_window": 4096}, "sliding_window: expected none, as windows are not modelled, got 4096"),
        (
            {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
            "sliding_window: expected none, or the 32768 positions or more, as windows are not modelled, got 4096",
        ),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            "sliding_window: expected none",
        ),
        (
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 2},
            "layer_types: expected full_attention or attention or global, got 'sliding_attention'",
        ),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "got 'linear_attention'"),
        ({"layers_block_type": ["attention", "mamba"] * 2}, "layers_block_type: expected full_attention or"),
        ({"attention_layers": ["global", "local"] * 2, "window_size": 256}, "attention_layers: expected"),
    ],
)
def test_what_is_not_modelled_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelShape.load({**BASE, **changes})
    assert words in str(error.value) and str(error.value).startswith("config: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_layer_period": 1},
        {"sliding_window": None},
        {"sliding_window": 4096, "max_position_embeddings": 4096},
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 64},
        {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 4},
        {"sliding_window": 64, "layer_types": ["sliding_attention"] * 4, "max_position_embeddings": 64},
        {"mlp_only_layers": [0]},
        {"moe_intermediate_size": 32},
    ],
)
def test_what_changes_nothing_is_taken(changes: dict) -> None:
    assert ModelShape.load({**BASE, **changes}) == ModelShape.load(BASE)


def test_experts_in_one_layer_of_two_as_wide_as_the_dense_ones() -> None:
    shape = ModelShape.load({**BASE, **EXPERTS, "moe_intermediate_size": 96, "expert_layer_period": 2})
    assert (shape.expert_period, shape.experts, shape.intermediate) == (2, 4, 96)
    every = ModelShape.load({**BASE, **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []})
    assert (every.expert_period, every.intermediate) == (1, 32)


@pytest.mark.parametrize("text, got", [("[1]", "list"), ("3", "int"), ('"llama"', "str"), ("null", "NoneType")])
def test_a_file_that_holds_no_object(text: str, got: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=rf"config.json: expected an object, got {got}"):
            ModelShape.load(source)


def test_json_that_is_none(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE)[:-1])
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got "):
        ModelShape.load(tmp_path)
