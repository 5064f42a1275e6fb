"""Hydragen from the command line to its files, on a tiny model; its bytes, its verdict and its own checks."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli, ops
from effops.cache.prefix_tree import PrefixTreeLayer
from effops.systems import hydragen
from tiny import TINY

for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
    pytest.importorskip(module, reason=f"the command's {extra} need {module}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "BATCH": 3, "PROMPT": 96, "OWN": 5, "SCORED": 4, "LAYER": {"heads": 4, "kv_heads": 2, "dim": 16},
        "BATCHES": (1, 2, 5), "PREFIXES": (32, 64, 128), "SUFFIX": 16, "TREE_BATCH": 6, "ROOT": 64, "BRANCHES": 3,
        "BRANCH": 32, "ENOUGH": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(hydragen, name, value)


def run(tiny_dir, *more: str) -> int:
    return cli.main(["systems", "run", "hydragen", "--model", str(tiny_dir), *more])


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys):
    assert run(tiny_dir, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")) == 0
    out = capsys.readouterr().out
    (report,) = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert report["problems"] == [] and report["verdict"] in out and "one layer's attention" in out
    text, layer, tree = report["tables"]
    (shared, loss, read, _), (_, other_loss, other_read, _) = text["rows"]
    assert shared == "prefix read once" and loss == pytest.approx(other_loss, abs=1e-5)
    row = 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim * 4
    assert (read, other_read) == pytest.approx([(n * 96 + 3 * 9) * row / 1e6 for n in (1, 3)])
    assert [row[:2] for row in layer["rows"]] == [[b, p] for b in (1, 2, 5) for p in (32, 64, 128)]
    for _, _, together, alone, ratio in layer["rows"]:
        assert ratio == pytest.approx(alone / together)
    assert [name for name, _ in tree["rows"]] == ["two levels", "one level", "none"]
    by_batch, by_prefix = report["curves"]
    assert [x for x, _ in by_batch["lines"]["shared"]] == [1, 2, 5]
    assert [x for x, _ in by_prefix["lines"]["each for itself"]] == [32, 64, 128]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_calls_read_the_same_keys():
    """Against dense attention over the pages in line; a pass of the two forms over other keys would not agree."""
    for calls in (hydragen._layer_calls(5, 64), hydragen._tree_calls()):
        results = [call() for call in calls]
        assert len({tuple(x.shape) for x in results}) == 1
        assert all(torch.allclose(x, results[-1], atol=1e-5) for x in results)
    k, v = (x.flatten(0, 1)[None] for x in hydragen._pages(4 + 5, seed=0))
    q = hydragen._draw(5, 4, 16, seed=3)
    for b, got in enumerate(hydragen._layer_calls(5, 64)[0]()):
        own = torch.cat([torch.arange(64), torch.arange(64 + 16 * b, 80 + 16 * b)])
        expected = ops.attention(q[b][None, None], k[:, own], v[:, own])
        assert torch.allclose(got, expected[0, 0], atol=1e-5)


@pytest.mark.parametrize(
    "what, factor",
    [("logits", 1), ("a layer's results", 1.01), ("a layer's results", torch.nan), ("a tree's results", 1.01)],
)
def test_results_that_are_not_the_same_are_a_failure(tiny_dir, monkeypatch, capsys, what, factor):
    if what == "logits":
        attend = PrefixTreeLayer.attend
        monkeypatch.setattr(PrefixTreeLayer, "attend", lambda *a, **options: attend(*a, **options).roll(1, 0))
    else:
        name = "_layer_calls" if "layer" in what else "_tree_calls"
        calls = getattr(hydragen, name)
        monkeypatch.setattr(hydragen, name, lambda *a: [lambda: calls(*a)[0]() * factor, *calls(*a)[1:]])
    assert run(tiny_dir) == 1
    out = capsys.readouterr().out
    assert f"{what} differ by" in out and out.count("differ by") == 1 and "not seen:" in out


@pytest.mark.parametrize("faster, expected", [(1.0, "partly seen"), (1e9, "not seen")])
def test_verdicts(tiny_dir, monkeypatch, capsys, faster, expected):
    seconds = iter(range(1, 10**6))
    monkeypatch.setattr(hydragen, "_compared", lambda calls: ([next(seconds) for _ in calls], 0.0))
    monkeypatch.setattr(hydragen, "FASTER", faster)
    assert run(tiny_dir) == 0
    assert f"{expected}:" in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_result_that_is_no_number_is_a_difference(at):
    results = [torch.ones(2), torch.ones(2), torch.ones(2)]
    results[at] = torch.tensor([torch.nan, 1.0])
    _, error = hydragen._compared([lambda x=x: x for x in results])
    assert not error <= hydragen.TOLERANCE
