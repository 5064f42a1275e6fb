"""Double Sparsity from the command line to its files, on a tiny model; its verdict and its own check."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli
from effops.cache import LabelChannels
from effops.cache.labelled import LabelledLayer
from effops.systems import double_sparsity, texts
from effops.systems.double_sparsity import VARIANTS, budgets_of
from effops.systems.quality import Measured

for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
    pytest.importorskip(module, reason=f"the command's {extra} need {module}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "SCORED": 3,
        "BLOCKS": 2,
        "OWN_SAMPLES": 2,
        "OWN_CONTEXT": 100,
        "RECALL_SAMPLES": 4,
        "RECALL_CONTEXT": 250,
    }.items():
        monkeypatch.setattr(double_sparsity, name, value)
    held_out = texts.held_out
    monkeypatch.setattr(texts, "held_out", lambda tokenizer, tokens: held_out(tokenizer, tokens)[:3])


def run(tiny_dir, *more: str) -> int:
    return cli.main(["systems", "run", "double_sparsity", "--model", str(tiny_dir), *more])


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys):
    assert run(tiny_dir, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["command"].startswith("effops") and result["libraries"]["torch"]
    (report,) = result["reports"]
    assert report["system"] == "double_sparsity" and report["problems"] == [] and report["model"] == str(tiny_dir)
    assert report["verdict"] in out and "Double Sparsity" in out and "cannot be shown" in out
    losses, recall = report["tables"]
    budgets = budgets_of(160 - 3 - 1)
    names = [(v.name, b) for v in VARIANTS for b in budgets]
    assert [tuple(row[:2]) for row in losses["rows"]] == [("full cache", None), *names]
    full = losses["rows"][0][2]
    for row in losses["rows"][1:]:
        assert row[3] == pytest.approx(row[2] - full) and row[5] < losses["rows"][0][5]
    assert recall["rows"][0][2] == 1 and "0% of numbers" in recall["note"]
    accuracy = {(row[0], row[1]): row[2] for row in recall["rows"][1:]}
    assert accuracy["D/4 channels", 31] > accuracy["first and last", 31]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_channels_are_calibrated_once(tiny_dir, monkeypatch, store):
    calls = []
    calibrate = double_sparsity.calibrate_channels
    monkeypatch.setattr(
        double_sparsity, "calibrate_channels", lambda model, batches: calls.append(model) or calibrate(model, batches)
    )
    for more, expected in (((), 1), ((), 0), (("--retrain",), 1)):
        calls.clear()
        assert run(tiny_dir, *more) == 0
        assert [model.config.vocab_size for model in calls].count(4096) == expected
        assert len(list(store.iterdir())) == 1


def test_a_cache_that_is_wrong_with_all_tokens_is_a_failure(tiny_dir, monkeypatch, capsys):
    append = LabelledLayer.append
    monkeypatch.setattr(LabelledLayer, "append", lambda self, k, v, step: append(self, k, v.roll(1, 2), step))
    assert run(tiny_dir) == 1
    assert "a budget of all tokens is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "losses, expected",
    [
        ((0.01, 0.01, 0.0, 0.2, 0.1), "seen"),
        ((0.2, 0.1, 0.01, 0.2, 0.1), "partly seen"),
        ((0.2, 0.1, 0.01, 0.005, 0.1), "not seen"),  # random channels do as well
        ((0.01, 0.01, 0.01, 0.02, 0.005), "not seen"),  # no labels are needed at all
        ((0.2, 0.1, 0.06, 0.2, 0.1), "not seen"),
    ],
)
def test_verdicts(losses, expected):
    headline = {variant.name: (x, 0.01) for variant, x in zip(VARIANTS, (*losses, 0.0), strict=True)}
    verdict, said = double_sparsity._judged(headline, Measured([2.0]), 120, 1920)
    assert verdict == expected and f"{losses[0]:+.3f}" in said and "120 tokens after 1920" in said


def test_random_channels_are_a_permutation():
    order = torch.arange(8).int().expand(3, 2, 8).contiguous()
    drawn = double_sparsity.randomised(LabelChannels(order, torch.zeros(3, 2, 8), torch.ones(3, 2, 8)))
    assert drawn.order.sort(-1).values.equal(order) and drawn.order.dtype == torch.int32
    assert not drawn.order[0, 0].equal(drawn.order[0, 1])
