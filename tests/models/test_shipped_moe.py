"""The shipped mixture of experts is what its card says, and effops computes it as Transformers does."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from effops.decoding import compare, generate
from effops.models import Mixtral, Tokenizer, load_model, shipped

transformers = pytest.importorskip("transformers", reason="the oracle that loads the model is transformers")
pytest.importorskip("tokenizers", reason="needed to read tokenizer.json")

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SCORED = ("colorsys", "graphlib", "queue")  # seconds on one core


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((shipped.moe_dir() / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(shipped.model_dir(), vocab_size=4096)


@pytest.fixture(scope="module")
def ours() -> Mixtral:
    model = load_model(shipped.moe_dir(), dtype=torch.float32)
    assert isinstance(model, Mixtral)
    return model


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shipped.moe_dir(), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@pytest.fixture
def tools(monkeypatch):
    """A function that imports a module of the training tools, which import each other by bare names."""
    before = set(sys.modules)
    for folder in ("train_code_model", "train_moe_model"):
        monkeypatch.syspath_prepend(str(TOOLS / folder))
    yield __import__
    for name in set(sys.modules) - before:
        if str(TOOLS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def heldout(name: str) -> bytes:
    return next(path for path in shipped.heldout_files() if path.name == f"{name}.py.txt").read_bytes()


def test_checkpoint_is_small_and_bfloat16(record):
    from safetensors import safe_open

    path = shipped.moe_dir() / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  (not a dictionary)
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (shipped.moe_dir() / "LICENSE").read_text()


def test_configuration_and_sizes(record, ours, tokenizer):
    experts = ours.config.experts
    assert ours.config.model_type == "mixtral" and experts is not None
    assert (experts.num_experts, experts.experts_per_token) == (8, 2)
    assert ours.config.max_position_embeddings == 2048 and ours.config.vocab_size == 4096
    assert tokenizer.encode("")[0] == ours.config.bos_token_id
    total = sum(p.numel() for p in ours.parameters())
    of_experts = sum(p.numel() for name, p in ours.named_parameters() if ".w_" in name)
    assert record["parameters"] == total <= 8_000_000
    assert record["active_parameters"] == total - of_experts * 3 // 4
    assert all(p.isfinite().all() for p in ours.parameters())


def test_card_is_the_record(record, tools):
    assert (shipped.moe_dir() / "MODEL_CARD.md").read_text() == tools("moe_card").moe_card(record, shipped.model_dir())
    sha256 = hashlib.sha256((shipped.model_dir() / "training.json").read_bytes()).hexdigest()
    assert record["data"] == {"split": "../code-7m/training.json", "sha256": sha256}


def test_training_with_effops_followed_the_reference(record):
    """As recorded: the same seed with Transformers' loop over experts and with effops' ops. They part where rounding
    sends a token to another expert, which a fault of 5 % would bring about in the first steps; and by no more than a
    fresh model's losses differ for that."""
    compared = record["effops_against_reference"]
    reference, mine, nudged = compared["losses"].values()
    assert list(compared["losses"])[:2] == ["eager", "effops"]
    assert len(reference) == len(mine) == len(nudged) == compared["steps"] >= 100
    assert reference[-1] < reference[0] - 1
    for curve, noted in zip((mine, nudged), compared["relative_difference"].values(), strict=True):
        differences = [abs(a - b) / a for a, b in zip(reference, curve, strict=True)]
        together = next((i for i, d in enumerate(differences) if d > 2**-19), len(differences))
        assert noted["steps_together"] == together and together >= 40
        assert noted["largest"] == pytest.approx(max(differences), rel=0.01) and max(differences) < 0.01


def test_no_expert_is_idle(record, ours):
    loads = torch.tensor(record["expert_loads"])
    assert loads.shape == (ours.config.num_hidden_layers, 8)
    torch.testing.assert_close(loads.sum(1), torch.ones(len(loads)), rtol=0, atol=1e-3)
    assert loads.min() > 0.01


@torch.no_grad()
def test_logits_are_those_of_transformers(ours, theirs, tokenizer):
    ids = torch.tensor([tokenizer.encode(heldout("heapq").decode())[:300]])
    exact = load_model(shipped.moe_dir(), dtype=torch.float64)(ids)
    mine, peer = (model.double() - exact for model in (ours(ids), theirs(ids).logits))
    # A token at the border of two experts may go to the other one; of these few have any.
    errors = [e.abs().amax(-1).flatten().sort().values for e in (mine, peer)]
    assert errors[0][:-3].max() <= 4 * errors[1][:-3].max() + 2**-20 * exact.abs().max()


def test_greedy_text_is_that_of_transformers(ours, theirs, tokenizer):
    ids = torch.tensor([tokenizer.encode(heldout("textwrap").decode())[:64]])
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    peer = theirs.generate(ids, max_new_tokens=48, **options)
    mine = generate(ours, ids, max_new_tokens=48, return_logits=True, ignore_eos=True)
    assert mine.logits is not None
    verdict = compare(
        ids[0].tolist(),
        mine.tokens[0],
        mine.logits[0],
        peer.sequences[0, 64:].tolist(),
        torch.stack(peer.logits, 1)[0],
        load_model(shipped.moe_dir(), dtype=torch.float64),
    )
    assert verdict.kind in ("identical", "near-tie"), verdict


def test_held_out_bits_per_byte_are_as_recorded(record, tools):
    """Scored with effops' attention and experts in Transformers' model."""
    import effops.integrations.transformers as integration

    integration.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shipped.moe_dir(), dtype=torch.float32, attn_implementation="effops", experts_implementation="effops"
    )
    evaluate, recorded = tools("evaluate"), record["held_out"]
    tokenizer = tools("train_moe").code_tokenizer()
    for name in SCORED:
        text = heldout(name)
        documents = tools("data").encode_documents(tokenizer, [text.decode()])
        bpb = evaluate.bits_per_byte(model, documents, len(text), recorded["context"], recorded["stride"])
        assert bpb == pytest.approx(recorded["bits_per_byte_per_module"][name], rel=1e-3), name
    xz = min(recorded["xz_bits_per_byte_file_by_file"], recorded["xz_bits_per_byte_together"])
    assert recorded["bits_per_byte"] <= 0.8 * xz
