"""Whole Transformers models with each implementation of their experts: counts, checks and the command."""

from __future__ import annotations

import json

import pytest
import torch
from effops import cli

pytest.importorskip("transformers", reason="the models are the library's")

from effops.bench import model

TINY = model.Case("float32", "olmoe", 3, tiny=True)


def test_counts():
    """The fewest bytes: every weight that is read once, of the experts only the chosen ones; no embedding."""
    work = model.work(TINY, ())
    sizes = model.TINY
    d, f, v, e = (sizes[k] for k in ("hidden_size", "moe_intermediate_size", "vocab_size", "num_experts"))
    each = 3 * d * model.TINY["intermediate_size"]
    attention = 2 * d * 4 * 8 + 2 * d * 2 * 8 + 4 * 8 + 2 * 8  # q, o; k, v; norms of queries and keys
    rest = 2 * (attention + 2 * d + e * d) + d + v * d
    active = work.fields["active_experts"]
    assert 2 * 2 <= active <= 2 * e and f == model.TINY["intermediate_size"]
    assert work.bytes == 4 * rest + round(active * each * 4)
    assert work.flops == 2 * 3 * (rest + 2 * 2 * each)
    assert work.others["effops-int8"].bytes == 4 * rest + round(active * each)


@pytest.mark.parametrize("name", model.MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_implementation_is_right(name, dtype):
    work = model.work(model.Case(dtype, name, 3, tiny=True), ("eager", "grouped_mm", "batched_mm"))
    assert set(work.candidates) == {*model.OWN, *model.PEERS}
    for candidate, call in work.candidates.items():
        assert work.check(candidate, call(0)) <= 1, candidate
        assert torch.equal(call(0), call(0)), candidate  # the cache is as it was
        assert not torch.equal(call(0), call(1)), candidate


def test_the_check_sees_mistakes():
    work = model.work(TINY, ())
    right = work.candidates["effops"](0)
    assert work.check("effops", right) <= 1 < work.check("effops", right * 1.001)
    assert work.check("effops-int8", right) <= 1 < work.check("effops-int8", right * 1.2)
    assert work.check("effops", right[:, :-1]) == torch.inf


def test_gathering_all_weights_is_not_run(monkeypatch):
    case = model.Case("float32", "olmoe", 9, tiny=True)
    assert callable(model.work(case, ("batched_mm",)).candidates["batched_mm"])
    monkeypatch.setattr(model, "GATHERED_BYTES", 9 * 2 * 3 * 24 * 32 * 4 - 1)  # of nine tokens' two experts
    assert model.work(case, ("batched_mm",)).candidates["batched_mm"] == "copies too much"


def test_passes_beyond_a_window():
    """The cache is put back although GPT-OSS's window of 128 has been passed."""
    work = model.work(model.Case("float32", "gpt_oss", 100, tiny=True), ())
    call = work.candidates["effops"]
    assert all(work.check("effops", call(0)) <= 1 for _ in range(3))


def test_one_model_is_held():
    held = [model.models_of(name, True, torch.float32, (3,)) for name in ("olmoe", "olmoe", "mixtral")]
    assert held[0] is held[1] and list(model._held.values()) == held[2:]


def test_the_command_runs_one_model(tiny, tmp_path):
    path = tmp_path / "model.json"
    arguments = ["bench", "model", "--quick", "--dtype", "f32", "--peer", "eager", "--repeat", "2"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in rows] == list(model.MODELS)
    assert all(set(row["results"]) == {*model.OWN, "eager"} for row in rows)
