"""Every fault of a model directory is one line that names file and field."""

from __future__ import annotations

import json
import re

import pytest
import torch
from effops.models import CheckpointError, Llama, ModelConfig, Tokenizer, load
from effops.models.checkpoint import INDEX, SINGLE, written_atomically

FIELDS = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


@pytest.fixture
def directory(tmp_path):
    Llama.random(ModelConfig(**FIELDS)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    Llama.random(ModelConfig(**FIELDS)).save_pretrained(tmp_path, max_shard_bytes=5_000)
    return tmp_path


def fails(action, *fragments):
    """The action raises CheckpointError in one line with all the fragments, in this order."""
    pattern = ".*".join(re.escape(str(f)) for f in fragments)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        action()
    assert "\n" not in str(caught.value)


def edit(directory, **changes):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    for name, value in changes.items():
        raw.pop(name) if value is ... else raw.update({name: value})
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "changes, field, words",
    [
        ({"model_type": "gpt2"}, "model_type", "expected one of llama, mistral, qwen2, qwen3, mixtral"),
        ({"model_type": ...}, "model_type", "got None"),
        ({"hidden_size": ...}, "hidden_size", "expected a positive integer, got nothing"),
        ({"vocab_size": -3}, "vocab_size", "expected a positive integer, got -3"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers", "expected a positive integer, got '2'"),
        ({"num_attention_heads": 0}, "num_attention_heads", "expected a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads", "a multiple of num_key_value_heads (3), got 2"),
        ({"hidden_act": "gelu"}, "hidden_act", "expected 'silu', got 'gelu'"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config",
            "expected quant_method gptq, awq or effops, got None",
        ),
        (
            {"rope_scaling": {"rope_type": "wavy"}},
            "rope_type",
            "expected one of default, linear, dynamic, llama3, yarn, longrope, got 'wavy'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor", "expected for linear, got nothing"),
        ({"dtype": "int8"}, "dtype", "expected a floating dtype, got 'int8'"),
    ],
)
def test_wrong_configuration(directory, changes, field, words):
    edit(directory, **changes)
    fails(lambda: Llama.from_pretrained(directory), directory / "config.json", field, words)


def test_layer_types(directory):
    edit(directory, model_type="qwen3", use_sliding_window=True, sliding_window=4, layer_types=["odd"] * 2)
    fails(lambda: Llama.from_pretrained(directory), "config.json", "layer_types", "got 'odd'")
    edit(directory, layer_types=["full_attention"])
    fails(lambda: Llama.from_pretrained(directory), "config.json", "layer_types", "expected 2 entries, got 1")


def test_missing_and_broken_json(directory):
    fails(lambda: ModelConfig.from_file(directory / "none"), directory / "none", "file", "got nothing")
    (directory / "config.json").write_text('{"model_type": ')
    fails(lambda: Llama.from_pretrained(directory), "config.json", "file", "expected readable JSON")
    (directory / "config.json").write_text("[1]")
    fails(lambda: Llama.from_pretrained(directory), "config.json", "file", "expected a JSON object, got list")


def test_missing_directory_and_weights(directory):
    fails(lambda: Llama.from_pretrained(directory / "none"), directory / "none")
    (directory / SINGLE).unlink()
    fails(
        lambda: Llama.from_pretrained(directory),
        directory,
        "weights",
        f"expected {SINGLE} or {INDEX}, got neither",
    )


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(directory, keep):
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    fails(lambda: Llama.from_pretrained(directory), path, "file", "expected a whole safetensors file")


def test_corrupt_weights(directory):
    path = directory / SINGLE
    path.write_bytes(b"\xff" * 1000)
    fails(lambda: Llama.from_pretrained(directory), path, "file", "expected a whole safetensors file")


def rewrite(directory, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def test_missing_tensor(directory):
    rewrite(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(
        lambda: Llama.from_pretrained(directory),
        SINGLE,
        "model.layers.1.mlp.up_proj.weight",
        "expected a tensor, got nothing",
    )


def test_wrong_shape(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": torch.zeros(7)}))
    fails(
        lambda: Llama.from_pretrained(directory),
        SINGLE,
        "model.norm.weight",
        "expected shape [16], got [7]",
    )


def test_unknown_tensor(directory):
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}))
    fails(
        lambda: Llama.from_pretrained(directory),
        SINGLE,
        "q_norm.weight",
        "expected no such tensor in a llama model",
    )


def test_harmless_extra_tensors(directory):
    before = Llama.from_pretrained(directory)
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert torch.equal(Llama.from_pretrained(directory).lm_head.weight, before.lm_head.weight)


def test_shard_faults(sharded):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[:-8])
    fails(lambda: Llama.from_pretrained(sharded), victim, "file", "expected a whole safetensors file")
    victim.unlink()
    fails(lambda: Llama.from_pretrained(sharded), victim, "file", INDEX, "got nothing")
    victim.write_bytes(content)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = victim.name
    (sharded / INDEX).write_text(json.dumps(index))
    fails(lambda: Llama.from_pretrained(sharded), victim, "model.norm.weight", "expected a readable tensor")
    (sharded / INDEX).write_text("{}")
    fails(lambda: Llama.from_pretrained(sharded), INDEX, "weight_map", "expected an object, got None")


def test_both_spellings_of_rope():
    new = {**FIELDS, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    old = {**FIELDS, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(old)
    assert ModelConfig.from_dict(ModelConfig.from_dict(old).to_dict()) == ModelConfig.from_dict(old)


def test_family_defaults_and_explicit_null():
    sizes = {k: v for k, v in FIELDS.items() if k not in ("num_key_value_heads", "head_dim")}
    mistral = {**sizes, "model_type": "mistral", "num_attention_heads": 16, "hidden_size": 64}
    absent = ModelConfig.from_dict(mistral)
    assert (absent.num_key_value_heads, absent.head_dim, absent.windows) == (8, 4, (4096, 4096))
    null = ModelConfig.from_dict({**mistral, "num_key_value_heads": None, "sliding_window": None})
    assert (null.num_key_value_heads, null.windows) == (16, (None, None))
    assert ModelConfig.from_dict({**sizes, "model_type": "llama"}).eos_token_ids == (2,)
    assert ModelConfig.from_dict({**sizes, "model_type": "llama", "eos_token_id": None}).eos_token_ids == ()


def tokenizer(tmp_path, words):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizer file needs the tokenizers library")
    vocab = {w: i for i, w in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=words[0]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))


def test_tokenizer_faults(directory):
    fails(lambda: load(directory), directory / "tokenizer.json", "file", "expected to exist, got nothing")
    tokenizer(directory, [f"w{i}" for i in range(51)])
    fails(lambda: load(directory), "tokenizer.json", "vocab", "below the model's vocab_size 50, got 50")
    (directory / "tokenizer.json").write_text("{}")
    fails(lambda: load(directory), "tokenizer.json", "file", "expected a tokenizer")


def test_tokenizer_round_trip(directory, tmp_path):
    tokenizer(directory, [f"w{i}" for i in range(50)])
    _, ours = load(directory)
    assert ours.encode("w3 w4") == [3, 4] and ours.decode([3, 4]) == "w3 w4"
    ours.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("w49") == [49]
    stream = ours.stream()
    assert "".join(stream(t) for t in (3, 4, 5)) == "w3 w4 w5"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
