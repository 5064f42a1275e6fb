"""tools/gpu_check.sh as far as it goes without a GPU: its stages, limits and files, and the checks of its calls."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TOOLS / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run tools/gpu_check.sh itself")
def test_without_a_gpu_it_says_so(tmp_path):
    done = script(str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("gpu_check: no GPU: ")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "--rehearse", "c")], ids=str)
def test_it_wants_a_folder(arguments, tmp_path):
    done = script(*(str(tmp_path / a) if a != "--rehearse" else a for a in arguments))
    assert done.returncode == 2 and "expected the folder" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the calls run there")
def test_every_call_twice(gpu_check, tmp_path, capsys):
    assert gpu_check.check_calls(tmp_path / "calls.json") == 0
    written = json.loads((tmp_path / "calls.json").read_text())
    names = {row["op"] for row in written["checks"]}
    assert written["device"] == "cpu" and names >= {"attention", "tree_attention", "verify_rejection", "sample"}
    assert not names & set(gpu_check.ONLY_CPU)
    assert f"{len(names)} of {len(names)} checks on cpu hold" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the calls run there")
def test_a_result_that_changes_is_a_failure(gpu_check, tmp_path, monkeypatch, capsys):
    import calls

    monkeypatch.setattr(calls, "run", lambda op, call: (torch.rand(3),))
    assert gpu_check.check_calls(tmp_path / "calls.json") == 1
    assert "attention: twice the same" in capsys.readouterr().out


def test_stages_fail_alone_and_in_time(gpu_check, tmp_path):
    def outcome(code: str, limit: int = 30) -> tuple[bool, str, str]:
        stage = gpu_check.Stage("one", [sys.executable, "-c", code], limit, "one.txt")
        got = gpu_check.execute(stage, tmp_path, "cuda")
        return got.ok, got.said, (tmp_path / "one.txt").read_text()

    assert outcome("print('first'); print('last')") == (True, "last", "first\nlast\n")
    assert outcome("raise SystemExit('why')")[:2] == (False, "why")
    ok, said, text = outcome("print('begun', flush=True); import time; time.sleep(60)", limit=1)
    assert (ok, said) == (False, "stopped after 1 s") and text.startswith("begun")
    missing = gpu_check.Stage("one", ["/nowhere/tool"], 5)
    assert "No such file" in gpu_check.execute(missing, tmp_path, "cuda").said


def test_it_keeps_to_nine_minutes_and_eight_files(gpu_check, tmp_path):
    stages = gpu_check.stages(tmp_path, rehearse=False)
    assert sum(stage.limit for stage in stages) <= 540
    written = {Path(word).name for stage in stages for word in stage.command if word.endswith(".json")}
    assert len(written | {stage.output for stage in stages if stage.output} | {"gpu_check.json"}) <= 8
