"""The demo: its plain-torch side is right, its files are whole, and it says NO where the sides differ."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the demo's table needs rich")
pytest.importorskip("matplotlib", reason="the demo's page needs matplotlib")

from effops.bench.demo import sides
from effops.bench.demo.forms import ATTENTION, Forms
from effops.bench.demo.prompts import Prompt
from effops.bench.demo.sides import Sides
from effops.bench.demo.torch_llama import TorchLlama
from effops.bench.demo.verdict import judge
from effops.cli import main
from effops.models import Llama, shipped


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_pretrained(shipped.model_dir(), dtype=torch.float32)


@pytest.mark.parametrize("form", ATTENTION)
def test_every_form_of_plain_torch_agrees_with_float64(model: Llama, form: str):
    tokens = torch.randint(3, 4096, (1, 40), generator=torch.Generator().manual_seed(0))
    prefill = "SDPA, enable_gqa" if form == "SDPA, group heads as rows" else form
    plain = TorchLlama(model, Forms(prefill=prefill, decode=form))
    exact = TorchLlama(Llama.from_pretrained(shipped.model_dir(), dtype=torch.float64))(tokens)[0]
    assert (plain(tokens)[0] - exact).abs().max() < 1e-4 * exact.abs().max()
    cache = plain.new_cache(40)
    plain.forward(tokens[0, :-1], cache)
    assert (plain.forward(tokens[0, -1:], cache)[0] - exact[-1]).abs().max() < 1e-4 * exact.abs().max()


def test_a_side_with_another_weight_is_a_no(model: Llama):
    prompt = Prompt("x", list(range(10, 60)))
    both = Sides(model, len(prompt.tokens), 16)
    honest = judge(
        both.exact, prompt.tokens, both.run("torch", prompt.tokens, 16), both.run("effops", prompt.tokens, 16)
    )
    assert honest.kind in ("identical", "near-tie")
    other = Llama.from_pretrained(shipped.model_dir(), dtype=torch.float32)
    with torch.no_grad():
        other.layers[3].mlp.down_proj.weight[:, :64] *= -1
    wrong = Sides(other, len(prompt.tokens), 16).run("effops", prompt.tokens, 16)
    assert judge(both.exact, prompt.tokens, both.run("torch", prompt.tokens, 16), wrong).kind == "NO"


def test_quick_run_writes_a_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompt = tmp_path / "mine.py"
    prompt.write_text("def <mine>():\n    return 1\n")
    arguments = ["--quick", "--prompt-file", str(prompt), "--new-tokens", "8", "--threads", "1"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert result["problems"] == []
    assert [row["dtype"] for row in result["text"]["rows"]] == ["float32", "bfloat16"]
    assert result["text"]["rows"][0]["judgement"]["kind"] in ("identical", "near-tie")
    assert all(row["new_tokens"] == 8 and row["speedup"] > 0 for row in result["text"]["rows"])
    assert [row["dtype"] for row in result["experts"]["rows"]] == ["float32", "bfloat16"]
    judged = result["experts"]["totals"]["float32"]["judgements"]
    assert set(judged) == {"eager + effops", "effops"} and all(sum(j.values()) == 1 for j in judged.values())
    assert result["long_context"]["points"][0]["speedup"] > 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "mine.py" in page and page.count("<svg") == 2 and "<h2>Mixture of experts</h2>" in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link", without_namespaces)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "index.html"]
    assert "mine.py" in capsys.readouterr().out


def test_a_wrong_side_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    honest = sides.generate

    def wrong(model: Llama, *arguments: Any, **options: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.layers[3].mlp.down_proj.weight[:, :64] *= -1
        return honest(other, *arguments, **options)

    monkeypatch.setattr(sides, "generate", wrong)
    assert main(["demo", "--quick", "--new-tokens", "16", "--threads", "1", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "demo.json").read_text())
    assert any("rows are NO" in problem for problem in result["problems"])
    assert result["problems"][0] in capsys.readouterr().out


@pytest.mark.parametrize("module, extra", [("rich", "demo"), ("matplotlib", "demo"), ("tokenizers", "models")])
def test_a_missing_extra_is_one_line(module: str, extra: str):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from effops.cli import main; sys.exit(main(['demo', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"effops demo: effops[{extra}] is needed: pip install 'effops[{extra}]'\n"


def test_a_model_directory_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json" in error


def test_a_prompt_longer_than_the_context_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = tmp_path / "long.py"
    long.write_text("x = 1\n" * 4000)
    assert main(["demo", "--prompt-file", str(long), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "long.py" in error and "at most" in error
    assert not (tmp_path / "out").exists()
