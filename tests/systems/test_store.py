"""The store: what was made is read again under the same settings, and under no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effops.models import Llama
from effops.systems.store import cache_dir, fingerprint, kept
from tiny import TINY

pytest.importorskip("safetensors", reason="the store keeps safetensors files")


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"x": torch.full((2, 3), float(self.calls)).t()}


def test_made_once(store):
    make = Maker()
    for expected, settings, again in [
        (1, {"a": 1, "b": [2]}, False), (1, {"b": [2], "a": 1}, False), (2, {"a": 1, "b": [3]}, False),
        (3, {"a": 1, "b": [2]}, True), (3, {"a": 1, "b": [2]}, False), (2, {"a": 1, "b": [3]}, False),
    ]:  # fmt: skip
        assert kept("one", settings, make, again=again)["x"].equal(torch.full((3, 2), float(expected)))
    assert make.calls == 3 and len(list(store.iterdir())) == 2
    kept("two", {"a": 1, "b": [2]}, make)
    assert make.calls == 4 and all(path.suffix == ".safetensors" for path in store.iterdir())


def test_a_failure_leaves_nothing(store):
    def make() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept("one", {}, make)
    assert not list(store.iterdir())


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("EFFOPS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("EFFOPS_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "effops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path(tmp_path) / ".cache" / "effops"


def test_every_weight_is_in_a_fingerprint():
    model = Llama.random(TINY)
    prints = {fingerprint(model), fingerprint(Llama.random(TINY))}
    assert len(prints) == 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.view(-1)[-1] += 1
            prints.add(fingerprint(model))
            parameter.copy_(before)
            assert fingerprint(model) in prints, name
    assert len(prints) == 1 + len(list(model.named_parameters()))
    prints.add(fingerprint(model.to(torch.bfloat16)))
    assert len(prints) == 2 + len(list(model.named_parameters()))
