"""The shipped code model is what its card says: sizes, split, and held-out bits per byte against xz."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import platform
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from effops.models import shipped

transformers = pytest.importorskip("transformers", reason="the oracle that loads the model is transformers")
Tokenizer = pytest.importorskip("tokenizers", reason="needed to read tokenizer.json").Tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "train_code_model"
FIXED_SUBSET = ("colorsys", "graphlib", "heapq", "queue", "textwrap")  # 68 kB, seconds on one core


def load_tool(name: str) -> ModuleType:
    """Module `name` of the training tool, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"train_code_model_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((shipped.model_dir() / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(shipped.model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return transformers.LlamaForCausalLM.from_pretrained(shipped.model_dir(), dtype=torch.float32).eval()


def test_checkpoint_is_small_and_bfloat16():
    path = shipped.model_dir() / "model.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert dtypes == {"BF16"}


def test_configuration_is_within_the_limits(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size <= 8192
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert all(p.isfinite().all() for p in model.parameters())


def test_tokenizer_fits_the_model_and_loses_nothing(model, tokenizer):
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    assert tokenizer.token_to_id("<s>") == model.config.bos_token_id
    assert tokenizer.token_to_id("</s>") == model.config.eos_token_id
    texts = [path.read_bytes().decode("utf-8") for path in shipped.heldout_files()]
    for text in [*texts, "", "\t\r\n  x\n\n", "naïve ✓ 日本語 \x00"]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == model.config.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_transformers_reads_the_tokenizer_alike(tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(shipped.model_dir())
    text = shipped.heldout_files()[0].read_text(encoding="utf-8")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids


def test_held_out_files_are_the_indexed_ones():
    directory = shipped.heldout_files()[0].parent
    index = json.loads((directory / "index.json").read_text())
    assert [path.name for path in shipped.heldout_files()] == [entry["file"] for entry in index["files"]]
    assert len(index["files"]) >= 20
    for entry in index["files"]:
        data = (directory / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    for licence in (directory / "LICENSE", shipped.model_dir() / "LICENSE"):
        assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence.read_text()


def test_no_held_out_file_was_trained_on(record):
    split = record["split"]
    held_out = {path.name.removesuffix(".txt") for path in shipped.heldout_files()}
    assert held_out == {f"{name}.py" for name in split["held_out_modules"]}
    assert not held_out & set(split["training_files"])
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in shipped.heldout_files()}
    assert not hashes & set(split["training_files"].values())


def test_recorded_window_overlap_is_at_most_one_percent(record):
    overlap = record["split"]["overlap"]
    assert overlap["window_tokens"] == 32
    assert overlap["share"] == overlap["found_in_training"] / overlap["held_out_windows"]
    assert overlap["share"] <= 0.01


def test_window_overlap_measured_anew(record, tokenizer):
    split = record["split"]
    data = load_tool("data")
    root = data.stdlib_dir()
    hashes = {path.as_posix(): hashlib.sha256((root / path).read_bytes()).hexdigest() for path in data.training_files()}
    if hashes != split["training_files"]:
        pytest.skip(
            f"the recorded split is Python {split['python_version']}'s library, this is another one "
            f"({platform.python_version()}); the recorded figure is checked above"
        )
    training = data.encode_documents(tokenizer, [data.read_source(root / name) for name in hashes])
    held_out = data.encode_documents(tokenizer, [data.read_source(path) for path in shipped.heldout_files()])
    hits, windows = data.window_overlap(held_out, training)
    assert sum(hits) == split["overlap"]["found_in_training"]
    assert sum(windows) == split["overlap"]["held_out_windows"]


def test_overlap_measure_finds_a_planted_copy():
    import numpy as np

    data = load_tool("data")
    training = np.arange(100)
    copied = np.concatenate([np.full(10, 7), training[20:60], np.full(10, 7)])
    hits, windows = data.window_overlap([copied, np.arange(31)], [training])
    assert hits == [40 - 32 + 1, 0]
    assert windows == [60 - 32 + 1, 0]


@pytest.mark.parametrize(("context", "stride"), [(60, 60), (60, 30), (16, 5), (100, 100), (200, 10)])
def test_every_token_is_scored_once_from_the_window_that_reaches_it_first(model, context, stride):
    ids = torch.randint(3, 4096, (100,), generator=torch.Generator().manual_seed(0))
    nats = 0.0
    for target in range(1, len(ids)):
        begin = max(0, math.ceil((target - context) / stride) * stride)
        with torch.inference_mode():
            logits = model(ids[None, begin:target]).logits[0, -1]
        nats -= logits.double().log_softmax(-1)[ids[target]].item()
    assert load_tool("evaluate").score_document(model, ids.numpy(), context, stride) == pytest.approx(nats, rel=1e-5)


def test_held_out_bits_per_byte_beat_xz(record, model, tokenizer):
    data, evaluate = load_tool("data"), load_tool("evaluate")
    recorded = record["held_out"]
    files = {path.name.removesuffix(".py.txt"): path.read_bytes() for path in shipped.heldout_files()}
    one_by_one, together = evaluate.xz_bits_per_byte(list(files.values()))
    assert recorded["bits_per_byte"] <= 0.8 * min(one_by_one, together)

    chosen = [files[name] for name in FIXED_SUBSET]
    documents = data.encode_documents(tokenizer, [text.decode("utf-8") for text in chosen])
    sizes = [len(text) for text in chosen]
    context, stride = recorded["context"], recorded["stride"]
    bpb = evaluate.bits_per_byte(model, documents, sum(sizes), context, stride)
    assert bpb <= 0.8 * min(evaluate.xz_bits_per_byte(chosen))
    parts = [recorded["bits_per_byte_per_module"][name] * size for name, size in zip(FIXED_SUBSET, sizes, strict=True)]
    assert bpb == pytest.approx(sum(parts) / sum(sizes), rel=1e-3)
