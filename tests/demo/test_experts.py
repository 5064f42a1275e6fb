"""The demo's mixture of experts: another model is a NO, and without the Transformers library the demo says so."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the demo's table needs rich")
pytest.importorskip("matplotlib", reason="the demo's page needs matplotlib")
pytest.importorskip("transformers", reason="the peer of this part of the demo")

from effops.bench.demo import experts
from effops.bench.demo.experts import EAGER, HOOK, OURS, ExpertSides
from effops.bench.demo.prompts import Prompt
from effops.bench.demo.verdict import Errors, Judgement
from effops.cli import main
from effops.models import load_model
from effops.models.shipped import moe_dir

PROMPT = Prompt("x", list(range(10, 60)))


def test_a_wrong_expert_is_a_no():
    sides = ExpertSides(torch.float32)
    (honest,) = experts.measure(sides, [PROMPT], 12, 2, lambda doing: None)
    assert {side: j.kind for side, j in honest.judgements.items()} == {HOOK: "identical", OURS: "identical"}
    assert [len(runs) for runs in honest.seconds.values()] == [2, 2, 2] and experts.problems([honest]) == []
    assert math.isclose(experts.summary([honest])["speedup"][OURS], honest.rate(OURS) / honest.rate(EAGER))
    model = load_model(moe_dir(), dtype=torch.float32)
    with torch.no_grad():
        model.layers[2].mlp.w_down *= -1
    sides.model = model
    (wrong,) = experts.measure(sides, [PROMPT], 12, 1, lambda doing: None)
    assert wrong.judgements[HOOK].kind == "identical" and wrong.judgements[OURS].kind == "NO"
    assert experts.problems([wrong]) == [f"experts, float32, {OURS}: 1 of 1 rows are NO"]


def test_files_are_spread_evenly():
    prompts = [Prompt(str(i), [1]) for i in range(24)]
    assert [p.name for p in experts.chosen(prompts)] == [str(i) for i in range(0, 24, 3)]
    assert experts.chosen(prompts[:3]) == prompts[:3] and len(experts.chosen(prompts[:9])) == 5


def test_without_the_library_the_demo_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    arguments = ["demo", "--quick", "--new-tokens", "4", "--threads", "1", "--prompt-tokens", "16"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "left out: the mixture of experts" in capsys.readouterr().out.replace("\n", " ")
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["experts"]["rows"] == [] and "transformers" in result["experts"]["missing"]
    assert "Left out: the mixture of experts" in (tmp_path / "index.html").read_text()


def test_larger_errors_in_a_short_type_are_a_problem():
    def row(ours: float, judged: int) -> experts.ExpertRow:
        judgements = {
            side: Judgement("same", None, judged, errors=Errors(1.0, 0.01, error))
            for side, error in ((HOOK, 0.01), (OURS, ours))
        }
        return experts.ExpertRow(PROMPT, "bfloat16", judged, {}, judgements)

    assert experts.problems([row(0.014, 300)]) == [] == experts.problems([row(0.1, 100)])
    (problem,) = experts.problems([row(0.016, 300)])
    assert OURS in problem and "the library's" in problem


def test_the_typical_error_is_that_of_the_median_position():
    exact = torch.zeros(5, 4, dtype=torch.float64)
    off = torch.full((5, 4), 0.5)
    off[3] = 100
    found = Errors.typical(exact + 2, exact.float() + 2, off + 2)
    assert (found.logits, found.torch, found.effops) == (2.0, 0.0, 0.5)
