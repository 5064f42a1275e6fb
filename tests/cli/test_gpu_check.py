"""tools/gpu_check.sh where there is no GPU. What it checks on one cannot be tested here; its inputs and bounds can."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effops import reference

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run tools/gpu_check.sh itself")
def test_without_a_gpu_it_says_so(tmp_path):
    command = ["bash", str(TOOLS / "gpu_check.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("gpu_check: no GPU: ")
    assert list((tmp_path / "out").iterdir()) == []


def test_it_wants_one_argument():
    done = subprocess.run(["bash", str(TOOLS / "gpu_check.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "expected one argument" in done.stderr


def test_its_comparison_tells_right_from_wrong():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    for dtype in gpu_check.DTYPES:
        for shape in (*gpu_check.SMALL, gpu_check.LARGE[0]):
            outs, lses = gpu_check.inputs(shape, dtype)
            out, lse = reference.merge_states(outs, lses)
            assert gpu_check.worst(outs, lses, (out, lse)) <= 1
            if lse.isfinite().any():
                assert gpu_check.worst(outs, lses, (1.05 * out, lse)) > 1
                assert gpu_check.worst(outs, lses, (out, lse + 0.01)) > 1
