"""GPTQ and AWQ tensors, packed here by their definitions, come back as the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import effops
import pytest
import torch
from effops.models import Llama, Mixtral, ModelConfig
from effops.models.errors import CheckpointError
from effops.models.quantization_config import QuantizationConfig
from effops.models.quantized import read_linear
from effops.nn import PackedLinear
from safetensors.torch import load_file, save_file
from strategies.values import same_bits
from torch import Tensor

N, K, GROUP = 24, 32, 16


def drawn(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [K, N]; scales and zeros [groups, N]."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (K, N), generator=generator)
    zeros = torch.randint(0, 2**bits, (K // GROUP, N), generator=generator)
    zeros[:, ::5] = 0
    return numbers, torch.rand(K // GROUP, N, generator=generator).half() + 0.5, zeros


def word(fields: list[int], bits: int) -> int:
    total = sum(f << (bits * i) for i, f in enumerate(fields))
    return total - 2**32 if total >= 2**31 else total


def pack(rows: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Along the last dimension, so many numbers a word."""
    each = 32 // bits
    order = order or tuple(range(each))
    return torch.tensor(
        [[word([row[i + j] for j in order], bits) for i in range(0, len(row), each)] for row in rows.tolist()]
    ).int()


def less_one(words: Tensor, bits: int) -> Tensor:
    """As writers of GPTQ's first form store zeros: the word less one in each field, so that a 0 borrows."""
    ones = word([1] * (32 // bits), bits)
    return (words.long() - ones & 2**32 - 1).to(torch.int32)


def weight_of(stored, bits: int) -> Tensor:
    """[N, K], inputs in their places."""
    w = ((stored.numbers.float() - stored.zeros[..., None]) * stored.scales[..., None]).flatten(1)
    if stored.order is None:
        return w
    out = torch.empty_like(w)
    out[:, stored.order] = w
    return out


@pytest.mark.parametrize("order", ("in order", "by importance"))
@pytest.mark.parametrize("stored_as", ("gptq", "gptq_v2"))
@pytest.mark.parametrize("bits", (4, 8))
def test_gptq(bits, stored_as, order):
    numbers, scales, zeros = drawn(bits)
    g_idx = torch.arange(K) // GROUP
    if order == "by importance":
        g_idx = g_idx[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    qzeros = pack(zeros, bits)
    tensors = {
        "qweight": pack(numbers.T, bits).T.contiguous(), "scales": scales, "g_idx": g_idx.int(),
        "qzeros": less_one(qzeros, bits) if stored_as == "gptq" else qzeros,
    }  # fmt: skip
    raw = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": stored_as}
    got = read_linear(tensors, QuantizationConfig.read(raw, "config.json"), "file")
    expected = (numbers - zeros[g_idx]) * scales.float()[g_idx]
    assert torch.equal(weight_of(got, bits), expected.T) and (got.order is None) == (order == "in order")


def test_awq():
    numbers, scales, zeros = drawn(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # of outputs in a word
    tensors = {"qweight": pack(numbers, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}
    config = QuantizationConfig.read({"quant_method": "awq", "bits": 4, "group_size": GROUP}, "config.json")
    group = torch.arange(K) // GROUP
    expected = (numbers - zeros[group]) * scales.float()[group]
    assert torch.equal(weight_of(read_linear(tensors, config, "file"), 4), expected.T)


def test_flaws_are_named():
    numbers, scales, zeros = drawn(4)
    tensors = {"qweight": pack(numbers.T, 4).T.contiguous(), "qzeros": pack(zeros, 4), "scales": scales}
    config = QuantizationConfig("gptq", 4, GROUP)
    read_linear(tensors, config, "file")
    for name in tensors:
        with pytest.raises(CheckpointError, match=f"file: {name}: expected"):
            read_linear({n: t for n, t in tensors.items() if n != name}, config, "file")
        with pytest.raises(CheckpointError, match=r"file: \w+: expected"):
            read_linear(tensors | {name: tensors[name][:-1]}, config, "file")
    with pytest.raises(CheckpointError, match="file: g_idx: expected 16 inputs in each of 2 groups"):
        read_linear(tensors | {"g_idx": torch.zeros(K).int()}, config, "file")
    with pytest.raises(CheckpointError, match="file: scales: expected 4 groups of 8 inputs, got 2"):
        read_linear(tensors, QuantizationConfig("gptq", 4, 8), "file")
    for flaw in ({"quant_method": "other"}, {"bits": 3}, {"group_size": 0}, {"checkpoint_format": "marlin"}):
        raw = {"quant_method": "gptq", "bits": 4, "group_size": 128} | flaw
        with pytest.raises(CheckpointError, match=r"config.json: quantization_config: expected"):
            QuantizationConfig.read(raw, "config.json")


def quantised_copy(source: Path, target: Path, raw: dict, order: str) -> dict[str, Tensor]:
    """A checkpoint whose projections are stored by the method, with what each of them stands for: [N, K] by name."""
    tensors, weights = load_file(str(source / "model.safetensors")), {}
    bits, method = raw["bits"], raw["quant_method"]
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if "_proj.weight" in n]:
        outputs, inputs = tensors.pop(name).shape
        stem, groups = name.removesuffix("weight"), inputs // GROUP
        numbers = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator)
        scales = (torch.rand(groups, outputs, generator=generator) / (16 * inputs**0.5 * 2 ** (bits - 4))).half()
        g_idx = torch.arange(inputs) // GROUP
        if order == "by importance":
            g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        weights[name] = ((numbers - zeros[g_idx]) * scales.float()[g_idx]).T
        fields = (0, 2, 4, 6, 1, 3, 5, 7) if method == "awq" else None
        qweight = pack(numbers, bits, fields) if method == "awq" else pack(numbers.T, bits).T.contiguous()
        qzeros = pack(zeros, bits, fields)
        if raw.get("checkpoint_format") == "gptq":
            qzeros = less_one(qzeros, bits)
        tensors |= {f"{stem}qweight": qweight, f"{stem}qzeros": qzeros, f"{stem}scales": scales}
        if method == "gptq":
            tensors[f"{stem}g_idx"] = g_idx.int()
            if f"{stem}bias" not in tensors:  # as some writers do
                tensors[f"{stem}bias"] = torch.zeros(outputs)
    target.mkdir()
    save_file(tensors, str(target / "model.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": raw}))
    return weights


@pytest.mark.parametrize(
    ("method", "bits", "order"),
    [("gptq", 4, "in order"), ("gptq", 4, "by importance"), ("gptq", 8, "in order"), ("awq", 4, "in order")],
)
@pytest.mark.parametrize("family", ("llama", "qwen2"))  # the latter with biases
def test_a_model(family, method, bits, order, tmp_path):
    sizes = {
        "model_type": family, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    plain = Llama.random(ModelConfig.from_dict(sizes), seed=2, std=0.3)
    plain.save_pretrained(tmp_path / "plain")
    raw = {"quant_method": method, "bits": bits, "group_size": GROUP}
    raw |= {"checkpoint_format": "gptq"} if method == "gptq" else {"version": "gemm", "zero_point": True}
    weights = quantised_copy(tmp_path / "plain", tmp_path / "packed", raw, order)
    for name, target in plain.checkpoint_tensors().items():
        if name in weights:
            with torch.no_grad():
                target.copy_(weights[name])
    model = Llama.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert isinstance(model.layers[0].mlp.down_proj, PackedLinear)
    for own, other in zip(model.layers, plain.layers, strict=True):
        for mine, right in zip(own.modules(), other.modules(), strict=True):
            if isinstance(mine, PackedLinear):
                assert torch.equal(mine.weight.dequantize(), right.weight)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=2e-4, atol=2e-4)
        model.load_state_dict(model.state_dict())
        model.save_pretrained(tmp_path / "again")
        again = Llama.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert same_bits(again(tokens), model(tokens))
        assert (again.layers[0].mlp.down_proj.weight.order is None) == (order == "in order")
        torch.testing.assert_close(model.bfloat16()(tokens).float(), plain(tokens), rtol=0.2, atol=0.2)


def moe_model() -> Mixtral:
    sizes = {
        "model_type": "qwen2_moe", "vocab_size": 40, "hidden_size": 32, "moe_intermediate_size": 24,
        "intermediate_size": 48, "shared_expert_intermediate_size": 40, "num_hidden_layers": 2, "num_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return Mixtral.random(ModelConfig.from_dict(sizes), seed=2, std=0.3)


def dense_model() -> Llama:
    sizes = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return Llama.random(ModelConfig.from_dict(sizes), seed=2, std=0.3)


@pytest.mark.parametrize(
    "options",
    [{"format": "int4", "group_size": 8}, {"format": "int8"}, {"format": "fp8_e4m3"},
     {"format": "int8", "group_size": 8, "symmetric": False, "activation": "int8"},
     {"format": "int4", "group_size": 8, "skip": ("layers.0.*",)}],
)  # fmt: skip
@pytest.mark.parametrize("build", (dense_model, moe_model))
def test_saved_as_they_are(build, options, tmp_path):
    model = build()
    effops.quantize_(model, **options)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    for name, t in mine.items():
        assert t.dtype == theirs[name].dtype and torch.equal(t.view(torch.uint8), theirs[name].view(torch.uint8)), name
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert same_bits(back(tokens), model(tokens))
        cached = back(tokens, back.new_cache(2, 9))
        assert same_bits(cached, model(tokens, model.new_cache(2, 9)))


def test_flaws_in_saved_ones_are_named(tmp_path):
    for build, layer in ((dense_model, "layers.1.mlp.down_proj"), (moe_model, "layers.1.mlp.panels")):
        model = build()
        effops.quantize_(model, "int4", group_size=8)
        model.save_pretrained(tmp_path)
        file = str(tmp_path / "model.safetensors")
        tensors = load_file(file)
        names = [n for n in tensors if n.startswith(f"packed.{layer}.")]
        assert len(names) == 2
        for name in names:
            for flawed in ({}, {name: tensors[name][:1].clone()}, {name: tensors[name].to(torch.int16)}):
                save_file({n: t for n, t in tensors.items() if n != name} | flawed, file)
                with pytest.raises(CheckpointError, match=f"{layer.split('.')[-1]}"):
                    type(model).from_pretrained(tmp_path)
        save_file(tensors | {"packed.layers.9.mlp.down_proj.data": tensors[names[0]].clone()}, file)
        with pytest.raises(CheckpointError, match=r"packed\.layers\.9.+: expected a layer of the model"):
            type(model).from_pretrained(tmp_path)


def test_other_flaws_in_saved_ones(tmp_path):
    model = dense_model()
    effops.quantize_(model, "int8", activation="int8")
    model.save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    tensors, own = load_file(file), "packed.layers.0.mlp.down_proj"
    config = json.loads((tmp_path / "config.json").read_text())
    for name, says in {
        "packed.data": "expected", f"{own}.junk": "expected one of data, order",
        "packed.embed_tokens.data": "got Embedding",
        "packed.layers.0.mlp.data": "expected a linear layer of the model, got MLP",
    }.items():  # fmt: skip
        save_file(tensors | {name: tensors[f"{own}.data"].clone()}, file)
        with pytest.raises(CheckpointError, match=says):
            Llama.from_pretrained(tmp_path)
    save_file(tensors, file)
    for activations, says in (
        ({"layers.9.x": "int8"}, "expected packed layers"),
        ({"lm_head": "int4"}, "expected int8"),
    ):
        raw = config | {"quantization_config": {"quant_method": "effops", "activations": activations}}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=says):
            Llama.from_pretrained(tmp_path)


def test_packed_layers_go_where_the_model_is(tmp_path):
    model = dense_model()
    effops.quantize_(model, "int4", group_size=8)
    model.save_pretrained(tmp_path)
    there = Llama.from_pretrained(tmp_path, device="meta")
    assert {t.device.type for t in there.state_dict().values()} == {"meta"}


def test_flawed_models_are_named(tmp_path):
    sizes = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    Llama.random(ModelConfig.from_dict(sizes), seed=2).save_pretrained(tmp_path / "plain")
    raw = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    quantised_copy(tmp_path / "plain", tmp_path / "packed", raw, "in order")
    file = str(tmp_path / "packed" / "model.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj."
    for part in ("qweight", "qzeros", "scales"):
        save_file({n: t for n, t in tensors.items() if n != name + part}, file)
        with pytest.raises(CheckpointError, match=f"{part}: expected a tensor, got nothing"):
            Llama.from_pretrained(tmp_path / "packed")
    save_file(tensors | {f"{name}bias": torch.ones(16)}, file)
    with pytest.raises(CheckpointError, match=r"k_proj\.bias: expected no such tensor"):
        Llama.from_pretrained(tmp_path / "packed")
    save_file(tensors | {f"{name}g_idx": tensors[f"{name}g_idx"].flip(0)}, file)
    with pytest.raises(CheckpointError, match="g_idx: expected one order of inputs for layers that are fused"):
        Llama.from_pretrained(tmp_path / "packed")
