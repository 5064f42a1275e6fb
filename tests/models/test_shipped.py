"""The shipped models are what their cards say: sizes, split, held-out bits per byte against xz, and how far the
drafters reach."""

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
from effops.decoding import MedusaHeads
from effops.models import Llama, shipped

transformers = pytest.importorskip("transformers", reason="the oracle that loads the model is transformers")
Tokenizer = pytest.importorskip("tokenizers", reason="needed to read tokenizer.json").Tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FIXED_SUBSET = ("colorsys", "graphlib", "heapq", "queue", "textwrap")  # 68 kB, seconds on one core
MINIMUM_LENGTH = 1.35  # tokens a step of a tree of 16 nodes on either of these
DRAFTED = ("reprlib", "sched")  # not in the acceptance table's files, each within one context


def load_tool(name: str, tool: str = "train_code_model") -> ModuleType:
    """Module `name` of a training tool, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{tool}_{name}", TOOLS / tool / f"{name}.py")
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


@pytest.mark.parametrize(
    ("directory", "megabytes"), [(shipped.model_dir(), 16), (shipped.medusa_dir(), 8), (shipped.draft_dir(), 8)]
)
def test_checkpoint_is_small_and_bfloat16(directory, megabytes):
    path = directory / "model.safetensors"
    assert path.stat().st_size <= megabytes * 2**20
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
    for licensed in (directory, shipped.model_dir(), shipped.medusa_dir(), shipped.draft_dir()):
        assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (licensed / "LICENSE").read_text()


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


def drafter_record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "training.json").read_text())


@pytest.fixture(scope="module")
def drafted(model, tokenizer):
    """(ids, the code model's final hidden states) of the DRAFTED files, each as one document."""
    texts = [path for path in shipped.heldout_files() if path.name.removesuffix(".py.txt") in DRAFTED]
    documents = load_tool("data").encode_documents(tokenizer, [path.read_bytes().decode("utf-8") for path in texts])
    found = {}
    for name, ids in zip(DRAFTED, map(torch.from_numpy, documents), strict=True):
        assert len(ids) <= model.config.max_position_embeddings
        with torch.inference_mode():
            found[name] = ids, model.model(input_ids=ids[None]).last_hidden_state[0]
    return found


def test_drafters_say_what_they_were_trained_and_counted_on():
    everything = {path.name.removesuffix(".py.txt") for path in shipped.heldout_files()}
    sha256 = hashlib.sha256((shipped.model_dir() / "training.json").read_bytes()).hexdigest()
    calibration = drafter_record(shipped.medusa_dir())["calibration_modules"]
    for directory in (shipped.medusa_dir(), shipped.draft_dir()):
        record = drafter_record(directory)
        assert record["data"] == {"split": "../code-7m/training.json", "sha256": sha256}
        assert set(record["held_out"]["modules"]) == everything - set(calibration)
    assert set(DRAFTED).isdisjoint(calibration)


def test_drafter_cards_are_their_records():
    card = load_tool("card", "train_drafters")
    record = drafter_record(shipped.medusa_dir())
    assert (shipped.medusa_dir() / "MODEL_CARD.md").read_text() == card.medusa_card(record)
    config = transformers.LlamaConfig.from_pretrained(shipped.draft_dir())
    record = drafter_record(shipped.draft_dir())
    assert (shipped.draft_dir() / "MODEL_CARD.md").read_text() == card.draft_card(record, config)


def test_medusa_heads_fit_the_model_and_carry_their_table(model):
    heads, record = MedusaHeads.from_pretrained(shipped.medusa_dir()), drafter_record(shipped.medusa_dir())
    assert (heads.num_heads, heads.hidden_size, heads.lm_heads) == (3, model.config.hidden_size, None)
    assert sum(p.numel() for p in heads.parameters()) == record["parameters"] <= 1_000_000
    assert all(p.isfinite().all() for p in heads.parameters())
    raw, counted = json.loads((shipped.medusa_dir() / "config.json").read_text()), record["acceptance"]
    assert heads.acceptance == raw["acceptance"] == counted["true_text"]
    assert raw["acceptance_samples"] == counted["samples"]
    assert raw["acceptance_greedy"] == counted["greedy"]
    for table in (counted["true_text"], counted["greedy"]):
        assert [len(row) for row in table] == [10] * 3
        assert all(sum(row) <= 1 for row in table)


def test_trees_reach_as_far_as_recorded(model, drafted):
    accept = load_tool("accept", "train_drafters")
    heads = MedusaHeads.from_pretrained(shipped.medusa_dir(), dtype=torch.float32)
    tree = accept.best_tree(heads.acceptance, 16)
    assert len(tree) == 16
    recorded = drafter_record(shipped.medusa_dir())["held_out"]["trees"]["16"]["per_module"]
    for name, (ids, hidden) in drafted.items():
        tokens, steps = accept.walk_tree(tree, accept.doc_ranks(heads, model.lm_head.weight, hidden, ids))
        assert tokens / steps == pytest.approx(recorded[name], rel=0.01)
        assert tokens / steps > MINIMUM_LENGTH


def test_draft_model_is_small_and_reaches_as_far_as_recorded(model, drafted):
    accept = load_tool("accept", "train_drafters")
    draft, record = Llama.from_pretrained(shipped.draft_dir(), dtype=torch.float32), drafter_record(shipped.draft_dir())
    assert draft.config.vocab_size == model.config.vocab_size
    assert draft.config.max_position_embeddings == model.config.max_position_embeddings
    assert sum(p.numel() for p in draft.parameters()) == record["parameters"] <= 1_000_000
    assert all(p.isfinite().all() for p in draft.parameters())
    recorded = record["held_out"]["chains"]["4"]["per_module"]
    for name, (ids, _) in drafted.items():
        with torch.inference_mode():
            hits = draft(ids[None])[0, :-1].argmax(-1) == ids[1:]
        tokens, steps = accept.walk_chain(4, hits)
        assert tokens / steps == pytest.approx(recorded[name], rel=0.01)


def test_walks_count_tokens_and_steps():
    accept = load_tool("accept", "train_drafters")
    table = [[0.5, 0.2, 0.1], [0.4, 0.3, 0.0]]
    assert accept.best_tree(table, 1) == {()}
    assert accept.best_tree(table, 4) == {(), (0,), (0, 0), (1,)}
    assert len(accept.best_tree(table, 100)) == 1 + 3 + 9
    # Steps at 0 (rank 1 fails), 1 (both match: tokens 2 to 4), 4 (one matches) and 6.
    ranks = torch.tensor([[1, 0, 9, 9, 0, 9, -1, -1], [0, 1, 9, 9, 7, -1, -1, -1]])
    assert accept.walk_tree({(), (0,), (0, 1)}, ranks) == (7, 4)
    hits = torch.tensor([False, True, True, False, False, True])
    assert accept.walk_chain(2, hits) == (6, 3)
    assert accept.walk_chain(1, hits) == (6, 4)
    assert accept.walk_chain(0, hits) == (6, 6)


def test_ranks_put_the_lower_of_equal_ids_first():
    accept = load_tool("accept", "train_drafters")
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).expand(4, -1)
    assert accept.rank_of(logits, torch.arange(4)).tolist() == [3, 0, 1, 2]
