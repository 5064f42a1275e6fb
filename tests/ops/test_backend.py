"""The choice of a backend, what devices do with index values that no host has checked, and the tests' own copies."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backend import NAME, OnDevice
from calls import CALLS, OPS, name_of, run
from effops import ops
from strategies.layouts import LAYOUTS, memory
from strategies.values import int32, normal, same_bits
from torch import Tensor

CALL = "import torch; from effops import ops; print(ops.silu_mul(torch.ones(2)).item())"


def call_with(**environment: str) -> str:
    kept = {n: x for n, x in os.environ.items() if n != "EFFOPS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", CALL], env=kept | environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_an_unknown_backend_is_an_error():
    assert "EFFOPS_BACKEND: expected cpu or simt, got tpu" in call_with(EFFOPS_BACKEND="tpu")


def test_a_missing_simt_library_is_one_error():
    said = call_with(EFFOPS_BACKEND="simt", EFFOPS_SIMT_LIBRARY="/nowhere/lib.so")
    assert "RuntimeError: EFFOPS_BACKEND=simt: expected a library that loads, got: /nowhere/lib.so" in said


def test_the_cpu_is_the_default():
    assert call_with() == call_with(EFFOPS_BACKEND="cpu") == "0.7310585975646973\n"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_calls_on_copies(op, layout):
    """The mode that takes the tests to a GPU, on the CPU: the same results, and the same bits in all memory written."""
    place = LAYOUTS[layout]

    def placed() -> dict[str, Any]:
        return {n: place(x) if isinstance(x, Tensor) else x for n, x in CALLS[name_of(op)]().items()}

    expected, got = placed(), placed()
    right = run(op, expected)
    with OnDevice("cpu"):
        results = run(op, got)
    assert all(same_bits(a, b) for a, b in zip(results, right, strict=True))
    for name, x in got.items():
        if isinstance(x, Tensor):
            assert torch.equal(memory(x), memory(expected[name])), name


@pytest.mark.skipif(NAME != "simt", reason="the host machine counts bank conflicts")
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("tokens", [1, 40])
def test_tiles_are_read_without_bank_conflicts(tokens, dim):
    """The last kernels of a forward and of a backward pass: the attention loops themselves."""
    default = Path(__file__).resolve().parents[2] / "build" / "simt" / "libeffops_simt.so"
    conflicts = ctypes.CDLL(os.environ.get("EFFOPS_SIMT_LIBRARY", str(default))).effops_simt_bank_conflicts
    conflicts.restype = ctypes.c_int64
    q, k, v = (normal(1, n, 2, dim, dtype=torch.bfloat16, seed=n).requires_grad_() for n in (tokens, 150, 151))
    out = ops.attention(q, k, v[:, 1:], causal=True)
    assert conflicts() == 0
    out.sum().backward()
    assert conflicts() == 0


def out_of_range(x: Tensor) -> list[Tensor]:
    """Index tensors like x with values far out of any range, and a little."""
    most = torch.iinfo(x.dtype).max
    return [torch.full_like(x, value) for value in (most, -most - 1, -1, 17, 1000)] + [x.flip(-1), x + 7, x - 2]


@pytest.mark.skipif(NAME == "cpu", reason="the CPU checks index values always")
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_unchecked_index_values_touch_no_memory(op, monkeypatch):
    """Whatever an index argument holds: no kernel reads or writes past the tensors of its call, which the host machine
    and, for the CUDA library, compute-sanitizer watch; and the next call is right."""
    expected = run(op, CALLS[name_of(op)]())
    monkeypatch.setenv("EFFOPS_CHECK", "0")
    plain = CALLS[name_of(op)]()
    for name, x in plain.items():
        if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.int8:  # int8: weights
            continue
        for values in out_of_range(x):
            try:
                run(op, CALLS[name_of(op)]() | {name: values})
            except RuntimeError as error:  # ops on the CPU alone check even now
                assert NAME not in str(error) and "expected" in str(error), error
    assert all(same_bits(a, b) for a, b in zip(run(op, CALLS[name_of(op)]()), expected, strict=True))


@pytest.mark.skipif(NAME == "cpu", reason="the CPU checks index values always")
def test_flawed_rows_without_checks(monkeypatch):
    """A token of the vocabulary comes out, and no error."""
    monkeypatch.setenv("EFFOPS_CHECK", "0")
    logits = torch.full((3, 9), torch.nan)
    logits[1], logits[2, 4] = -torch.inf, torch.inf
    u = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    for x in (logits, torch.zeros(3, 9)):
        assert all(0 <= token < 9 for token in ops.sample(x, u, top_k=5, top_p=0.5).tolist())
    laws = torch.full((1, 3, 5), torch.nan)
    tree, drafts = int32(-1, 0, 1)[None], torch.tensor([[0, 7, -3]])
    for siblings in ("iid", "without_replacement", "deterministic"):
        draft = None if siblings == "deterministic" else laws
        got = ops.verify_rejection(tree, drafts, draft, laws, torch.full((1, 4), 0.5).double(), siblings=siblings)
        assert 1 <= got.count <= 3 and 0 <= got.next_token < 5
