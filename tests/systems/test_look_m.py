"""LOOK-M from the command line to its files, on a tiny model; its stand-in for images, verdict and own check."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli
from effops.cache import MergedKVCache
from effops.cache.merged_layer import MergedLayer
from effops.systems import look_m, texts
from effops.systems.look_m import SHARES, VARIANTS
from effops.systems.quality import Measured
from strategies.values import normal

for module, extra in (("rich", "tables"), ("matplotlib", "drawings"), ("tokenizers", "texts")):
    pytest.importorskip(module, reason=f"the command's {extra} need {module}")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"SCORED": 3, "PATCHES": 40, "OBJECTS": 4, "QUERIES": 3, "SAMPLES": 2}.items():
        monkeypatch.setattr(look_m, name, value)
    held_out = texts.held_out
    monkeypatch.setattr(texts, "held_out", lambda tokenizer, tokens: held_out(tokenizer, tokens)[:3])


def run(tiny_dir, *more: str) -> int:
    return cli.main(["systems", "run", "look_m", "--model", str(tiny_dir), *more])


def test_tables_figures_and_a_drawing(tiny_dir, tmp_path, capsys):
    assert run(tiny_dir, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")) == 0
    out = capsys.readouterr().out
    (report,) = json.loads((tmp_path / "a.json").read_text())["reports"]
    assert report["system"] == "look_m" and report["problems"] == [] and report["model"] == str(tiny_dir)
    assert report["verdict"] in out and "LOOK-M" in out and "cannot be shown" in out
    losses, images = report["tables"]
    names = [(v.name, int(100 * s)) for v in VARIANTS for s in SHARES]
    assert [tuple(row[:2]) for row in losses["rows"]] == [("full cache", 100), *names]
    full = losses["rows"][0]
    for row in losses["rows"][1:]:
        assert row[3] == pytest.approx(row[2] - full[2]) and row[5] < full[5]
    assert [row[0] for row in images["rows"]] == [v.name for v in VARIANTS]
    assert all(0 < x < 1.5 for row in images["rows"] for x in row[1:])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_cache_that_is_wrong_with_all_tokens_is_a_failure(tiny_dir, monkeypatch, capsys):
    append = MergedLayer.append
    monkeypatch.setattr(MergedLayer, "append", lambda self, k, v, step: append(self, k, v.roll(1, 2), step))
    rotary_append = MergedLayer.rotary_append

    def wrong(self, qkv, cos, sin, step):
        return rotary_append(self, torch.cat([qkv[:, :, :-2], qkv[:, :, -2:].roll(1, 2)], 2), cos, sin, step)

    monkeypatch.setattr(MergedLayer, "rotary_append", wrong)
    assert run(tiny_dir) == 1
    assert "a budget of all tokens is" in capsys.readouterr().out


def test_images_are_near_duplicates_among_text(monkeypatch):
    """Without noise of as many keys as objects, with their values; a budget of all tokens is no error."""
    assert all(look_m.image_error(v, 1.0) == 0 for v in VARIANTS)
    monkeypatch.setattr(look_m, "NOISE", 0.0)
    k, v, text = look_m.image_prompt(0)
    assert k.shape == v.shape == (1, text.shape[1], look_m.KV_HEADS, look_m.DIM)
    assert int(text.sum()) == (look_m.IMAGES + 1) * look_m.TEXT
    assert int((~text).sum()) == look_m.IMAGES * look_m.PATCHES
    objects = [x[0, ~text[0]].flatten(1).unique(dim=0) for x in (k, v, torch.cat([k, v], -1))]
    assert {len(x) for x in objects} == {len(objects[0])} and len(objects[0]) <= look_m.IMAGES * look_m.OBJECTS


def test_random_entries():
    """As many as of the others, protected and recent ones among them, drawn anew for each seed."""
    held = []
    for seed in (None, 0, 0, 1):
        cache = MergedKVCache(1, 1, 100, 2, 4, heavy=0.2, recent=0.1, merging="none")
        cache = cache if seed is None else look_m.randomised(cache, seed)
        step = cache.plan(100)
        v = torch.arange(100.0)[None, :, None, None].expand(1, -1, 2, 4)
        cache.layers[0].append(normal(1, 100, 2, 4), v, step)
        cache.layers[0].attend(normal(1, 100, 4, 4, seed=1), step)
        cache.advance(step)
        assert cache.held == [30]
        held.append(cache.layers[0].v[0, :30, 0, 0].tolist())
        assert held[-1][:4] == [0, 1, 2, 3] and held[-1][-10:] == list(range(90, 100))
    assert held[1] == held[2] and held[1] != held[0] and held[1] != held[3]


@pytest.mark.parametrize(
    "losses, images, expected",
    [
        ((0.01, 0.02, 0.1), (0.1, 0.2, 0.3), "seen"),
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), "partly seen"),  # better, but not small
        ((0.01, 0.02, 0.1), (0.2, 0.1, 0.3), "partly seen"),  # on text alone
        ((0.02, 0.01, 0.1), (0.1, 0.2, 0.3), "partly seen"),  # on images alone
        ((0.02, 0.01, 0.1), (0.2, 0.1, 0.3), "not seen"),
        ((0.2, 0.3, 0.1), (0.2, 0.3, 0.1), "not seen"),  # random entries do better
    ],
)
def test_verdicts(losses, images, expected):
    chosen = [VARIANTS[i] for i in (0, 3, 4)]
    above = {look_m._key(v, look_m.PAPER): (x, 0.01) for v, x in zip(chosen, losses, strict=True)}
    errors = {v.name: {look_m.PAPER: x} for v, x in zip(chosen, images, strict=True)}
    verdict, said = look_m._judged(above, errors, Measured([2.0]), 960)
    assert verdict == expected and f"{losses[0]:+.3f}" in said and "a fifth of 960 tokens" in said
