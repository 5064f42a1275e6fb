"""``effops selftest`` passes here, and fails on a kernel with a small mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLANT = """
import sys, torch
from effops import cli, ops, reference

def rms_norm(x, weight, eps=1e-6, *, weight_offset=0.0):
    {rms_norm}

def attention(q, k, v, **options):
    options = {{name: x or None if name == "window" else x for name, x in options.items()}}
    {attention}

library = torch.library.Library("effops", "IMPL")
library.impl("{op}", {op}, "CPU", allow_override=True)
sys.exit(cli.main(["selftest"]))
"""
RIGHT = {
    "rms_norm": "return reference.rms_norm(x, weight, eps, weight_offset=weight_offset)",
    "attention": "return reference.attention(q, k, v, return_lse=True, **options)",
}
WRONG = {
    "rms_norm": "return reference.rms_norm(x, weight, 0.0, weight_offset=weight_offset)",  # eps is lost
    "attention": "return reference.attention(q, k[:, 1:], v[:, 1:], return_lse=True, **options)",  # so is the first key
}


def run_planted(op: str, kernels: dict[str, str]) -> subprocess.CompletedProcess[str]:
    code = PLANT.format(op=op, **kernels)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_passes_and_names_what_it_did(run_cli):
    done = run_cli("selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "instruction set:" in done.stdout and "FAILED" not in done.stdout
    for op in (
        "attention",
        "varlen_attention",
        "merge_states",
        "append_kv",
        "fused_experts",
        "grouped_mm",
        "packed_linear",
        "rotary_append",
        "sample",
        "sampling_probs",
        "silu_mul",
        "pack_ancestors",
        "topk_routing",
        "verify_rejection",
    ):
        assert f"\n{op} " in done.stdout


@pytest.mark.parametrize("op", WRONG)
def test_fails_on_a_planted_kernel(op):
    planted = run_planted(op, RIGHT | {op: WRONG[op]})
    assert planted.returncode == 1, planted.stdout + planted.stderr
    assert f"FAILED {op}: " in planted.stdout and "error / bound" in planted.stdout


def test_a_right_kernel_in_the_same_place_passes():
    """The plant itself is not what fails."""
    planted = run_planted("rms_norm", RIGHT)
    assert planted.returncode == 0, planted.stdout + planted.stderr
