"""What only models with experts have: two namings of their weights, families, faults, drafters."""

from __future__ import annotations

import json

import pytest
import torch
from effops.decoding import CopyDrafter, generate
from effops.models import CheckpointError, Llama, Mixtral, ModelConfig, load_model
from effops.models.moe_config import ExpertsConfig, LatentConfig

FIELDS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=12)
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "head_dim": 10,
    "latent": LatentConfig(q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5),
    "experts": ExpertsConfig(4, 2, 12, "sigmoid", True, 2.5, True, 2, 1, "top2", 12, False, (0,)),
}


def small(**changes) -> ModelConfig:
    return ModelConfig(**{"model_type": "mixtral", **FIELDS, "experts": EXPERTS, **changes})


def random(**changes) -> Mixtral:
    return Mixtral.random(small(**changes), std=0.3)


@torch.no_grad()
def test_panels_are_the_same_model(tmp_path):
    model, ids = random(), torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    plain = model(ids)
    assert model.pack_experts_() is model
    torch.testing.assert_close(model(ids), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="expected experts with parameters, got weights in panels"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@torch.no_grad()
def test_fused_names_are_the_same_model(tmp_path, family):
    """All experts in one tensor, as Transformers writes them on request."""
    transformers = pytest.importorskip("transformers", reason="transformers writes both forms")
    config = transformers.AutoConfig.for_model(
        family,
        **{**FIELDS, "head_dim": 4 if family == "deepseek_v3" else 8},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=6,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        num_local_experts=4,
    )
    peer = transformers.AutoModelForCausalLM.from_config(config)
    peer.save_pretrained(tmp_path / "each")
    peer.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = [load_model(tmp_path / kind) for kind in ("each", "fused")]
    each, fused = (model.state_dict() for model in names)
    assert isinstance(names[0], Mixtral) and each.keys() == fused.keys()
    assert all(torch.equal(tensor, fused[name]) for name, tensor in each.items())


@torch.no_grad()
def test_layers_past_the_last_are_left_out(tmp_path):
    """DeepSeek-V3's files hold its multi-token prediction as one more layer."""
    from safetensors.torch import load_file, save_file

    random(**DEEPSEEK).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(3)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    edit(tmp_path, num_hidden_layers=1)
    assert len(load_model(tmp_path).layers) == 1


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, DEEPSEEK], ids=["mixtral", "deepseek"])
def test_drafted_text_is_the_plain_text(fields):
    """Trees through experts and latent attention, dense and paged."""
    model = random(**fields)
    prompt = torch.arange(12).remainder(5)[None]
    plain = generate(model, prompt, max_new_tokens=24, ignore_eos=True).tokens
    for cache in (None, model.new_paged_cache(1, 16, 4)):
        drafted = generate(model, prompt, max_new_tokens=24, ignore_eos=True, drafter=CopyDrafter(), cache=cache)
        assert drafted.tokens == plain
        assert drafted.stats.steps < 24  # drafts were accepted


def test_latent_caches_hold_both_head_sizes():
    model = random(**DEEPSEEK)
    for cache in (model.new_cache(1, 8), model.new_paged_cache(1, 2, 4)):
        assert cache.k.shape[-2:] == (2, 10) and cache.v.shape[-2:] == (2, 5)


def test_random_models_have_all_they_need():
    model = random(**DEEPSEEK)
    assert torch.isfinite(model(torch.arange(9)[None])).all()
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("shared.down_proj.weight") for name in names)
    assert not any(name.startswith("layers.0.mlp.router") for name in names)


def edit(directory, **changes):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        raw.pop(name, None) if value is ... else raw.update({name: value})
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "fields, changes, words",
    [
        ({}, {"num_local_experts": 0}, "num_experts: expected a positive integer, got 0"),
        ({}, {"num_experts_per_tok": 5}, r"num_experts_per_tok: expected at most num_experts \(4\), got 5"),
        (DEEPSEEK, {"moe_intermediate_size": "x"}, "moe_intermediate_size: expected a positive integer, got 'x'"),
        (DEEPSEEK, {"n_group": 3}, r"n_group: expected a divisor of 4 and at least topk_group \(1\), got 3"),
        (DEEPSEEK, {"num_key_value_heads": 1}, r"num_key_value_heads: expected num_attention_heads \(2\)"),
        (DEEPSEEK, {"kv_lora_rank": -1}, "kv_lora_rank: expected a positive integer, got -1"),
        (
            DEEPSEEK,
            {"model_type": "deepseek_v2", "topk_method": "noaux_tc", "norm_topk_prob": False},
            "topk_method: expected greedy or group_limited_greedy, got 'noaux_tc'",
        ),
        (DEEPSEEK, {"model_type": "deepseek_v2"}, "norm_topk_prob: expected false, got true"),
    ],
)
def test_wrong_configurations(tmp_path, fields, changes, words):
    random(**fields).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: {words}"):
        load_model(tmp_path)


def test_each_class_has_its_families(tmp_path):
    random().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected one of llama, mistral, qwen2, qwen3 for Llama, got 'mixtral'"):
        Llama.from_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is Mixtral
    with pytest.raises(ValueError, match=r"Llama: model_type: expected one of llama, .*, got 'mixtral'"):
        Llama(small())


def test_missing_and_unknown_experts(tmp_path):
    random().save_pretrained(tmp_path)
    edit(tmp_path, num_local_experts=5)
    with pytest.raises(CheckpointError, match=r"gate\.weight: expected shape \[5, 16\], got \[4, 16\]"):
        load_model(tmp_path)
    edit(tmp_path, num_local_experts=3)
    with pytest.raises(CheckpointError, match=r"gate\.weight: expected shape \[3, 16\], got \[4, 16\]"):
        load_model(tmp_path)
