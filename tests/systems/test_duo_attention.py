"""DuoAttention from the command line to its files, on a tiny model; its choices, its verdict and its own check."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from effops import cli
from effops.cache.streaming import StreamingLayer
from effops.models import Llama, Tokenizer, shipped
from effops.systems import duo_attention, texts
from effops.systems.duo_attention import CHOICES, SPARSITIES, heads_of
from effops.systems.quality import Measured
from effops.systems.runner import Run
from tiny import TINY

for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
    pytest.importorskip(module, reason=f"the command's {extra} need {module}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "STEPS": 1, "CONTEXTS": (96, 200), "PAIRS": 1, "WORDS": 2, "NUM_SINKS": 2, "RECENT": 16, "SCORED": 3,
        "RECALL_SAMPLES": 4, "RECALL_CONTEXT": 300, "RECALL_STEPS": 60,
    }.items():  # fmt: skip
        monkeypatch.setattr(duo_attention, name, value)
    held_out = texts.held_out
    monkeypatch.setattr(texts, "held_out", lambda tokenizer, tokens: held_out(tokenizer, tokens)[:3])


def run(tiny_dir, *more: str) -> int:
    return cli.main(["systems", "run", "duo_attention", "--model", str(tiny_dir), *more])


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys, store):
    assert run(tiny_dir, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")) == 0
    out = capsys.readouterr().out
    (report,) = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert report["problems"] == [] and report["verdict"] in out and "training gates" in out
    gates, losses, recall = report["tables"]
    assert [row[0] for row in gates["rows"]] == ["0", "1", "2"]
    # At first only its price moves a gate: one step of AdamW is the learning rate.
    assert [x for row in gates["rows"] for x in row[1:]] == pytest.approx([0.98] * 6)
    assert [row[0] for row in losses["rows"]] == ["all", *(3 * list(CHOICES)), "none"]
    assert [row[1] for row in losses["rows"]] == [0, *(p for p in (25, 50, 75) for _ in CHOICES), 100]
    memory = [row[5] for row in losses["rows"]]
    assert memory == sorted(memory, reverse=True) and memory[2] == memory[3] and memory[-1] < memory[0] / 2
    assert [(name, x) for name, x in recall["rows"] if "found" in name] == [("layer 1, head 0, found", 1.0)]
    assert sum(x for _, x in recall["rows"]) < 2 and len(recall["rows"]) == 4
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(store.iterdir())) == 1
    kept = [path.read_bytes() for path in store.iterdir()]
    assert run(tiny_dir) == 0 and "training gates" not in capsys.readouterr().out
    assert [path.read_bytes() for path in store.iterdir()] == kept


def test_full_heads_that_are_not_the_full_cache_are_a_failure(tiny_dir, monkeypatch, capsys):
    append = StreamingLayer.append
    monkeypatch.setattr(StreamingLayer, "append", lambda self, k, v, step: append(self, k, v.roll(1, 2), step))
    assert run(tiny_dir) == 1
    assert "full heads alone are" in capsys.readouterr().out


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_choice_keeps_as_many_heads(choice, sparsity):
    gates = torch.arange(12.0).view(6, 2)
    full = heads_of(gates, choice, sparsity)
    assert full.sum() == heads_of(gates, "found", sparsity).sum()
    if choice == "smallest gates" and 0 < full.sum() < 12:
        assert gates[full].max() < gates[~full].min()


@pytest.mark.parametrize(
    "losses, expected",
    [((0.01, 0.2, 0.3), "seen"), ((0.1, 0.2, 0.3), "partly seen"), ((0.01, 0.005, 0.3), "not seen"),
     ((0.01, 0.3, 0.005), "not seen")],
)  # fmt: skip
def test_verdicts(losses, expected):
    above = {f"{choice}, 0.5": (x, 0.01) for choice, x in zip(CHOICES, losses, strict=True)}
    measured = {"full cache": Measured([2.0])}
    measured |= {name: Measured(nbytes=n) for name, n in (("all heads full", 300), ("found, 0.5", 200))}
    verdict, said = duo_attention._judged(above, measured, 1920)
    assert verdict == expected and f"{losses[0]:+.3f}" in said and "memory is 1/1.50" in said


def test_windowed_models_are_refused():
    model = Llama.random(replace(TINY, windows=(8, 8, 8)))
    tokenizer = Tokenizer.from_pretrained(shipped.model_dir())
    with pytest.raises(ValueError, match="RetrievalHeadFinder: model: expected layers that see every key"):
        duo_attention.run(Run(lambda: (model, tokenizer), "windowed"))
