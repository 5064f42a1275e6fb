"""Floors, the void rule and the correctness gate, without a machine to measure."""

from __future__ import annotations

import pytest
import torch
from effops.bench import report, roof, timing
from effops.bench.roof import Samples
from effops.bench.work import Other, Work


class SteadyRoof:
    """Hands out the bandwidths it is given, over and over; the peak stays."""

    device = "cpu"

    def __init__(self, *reads: float) -> None:
        self.reads, self.taken = reads, 0

    def sample(self, into: Samples, dtype: torch.dtype) -> None:
        into.read.append(self.reads[self.taken % len(self.reads)])
        into.peak.append(1e12)
        self.taken += 1


def work(candidates, check=lambda name, result: 0.5, bytes_=10_000, flops=1_000) -> Work:
    return Work("case", {}, torch.float32, bytes_, flops, 2, candidates, check)


def test_floor_is_the_larger_of_the_two_limits():
    samples = Samples(read=[10e9, 20e9, 12e9], peak=[100e9])
    assert samples.floor(12e9, 0) == 1.0  # the median bandwidth
    assert samples.floor(12e9, 50e9) == 1.0 and samples.floor(12e9, 300e9) == 3.0


def test_drift():
    assert roof.drift([]) == roof.drift([5.0]) == roof.drift([5.0, 5.0]) == 0.0
    assert roof.drift([10.0, 8.0, 9.0]) == pytest.approx(0.2)
    samples = Samples(read=[10.0, 8.0], peak=[1.0, 0.5])
    assert samples.drift(100, 1) == pytest.approx(0.2) and samples.drift(1, 100) == pytest.approx(0.5)
    assert Samples(read=[10.0, 9.0], peak=[1.0, 0.05]).drift(100, 1) == pytest.approx(0.5)  # 10 s, then 20
    assert Samples().drift(1, 1) == 0.0


def test_the_roof_is_sampled_around_and_between_the_rounds():
    steady = SteadyRoof(1e9)
    row = timing.measure(work({"effops": lambda i: i}), steady, rounds=4)
    assert steady.taken == len(row.samples.read) == 5 and row.retries == 0
    assert row.results["effops"].status == "ok" and len(row.results["effops"].times) == 4
    assert row.median("effops") > 0 and row.memory_bound
    assert row.rate("effops") == pytest.approx(10_000 / row.median("effops") / 1e9)


def test_what_computes_something_else_has_a_floor_of_its_own():
    two = work({"effops": lambda i: i, "less": lambda i: i})
    two.others["less"] = Other("less", bytes=10, flops=50_000)
    row = timing.measure(two, SteadyRoof(1e9), rounds=2)
    assert row.floor == row.floor_of("effops") == pytest.approx(10e-6) and row.memory_bound
    assert row.floor_of("less") == pytest.approx(50e-9) and not row.bound_by_memory("less")
    assert row.rate("less") == pytest.approx(50_000 / row.median("less") / 1e9)
    own, less = report.entries(row)
    assert (own["computes"], own["unit"]) == ("", "GB/s") and (less["computes"], less["unit"]) == ("less", "GFLOP/s")
    assert less["of_floor"] == pytest.approx(row.floor_of("less") / row.median("less"))


def test_an_unsteady_row_is_retried_and_then_void():
    unsteady = SteadyRoof(1e9, 0.5e9)
    row = timing.measure(work({"effops": lambda i: i}), unsteady, rounds=1)
    assert row.retries == timing.RETRIES and unsteady.taken == 2 * (timing.RETRIES + 1)
    result = row.results["effops"]
    assert result.status == "void" and "drifted by 50%" in result.reason and row.median("effops") is None


def test_a_row_that_settles_is_kept():
    row = timing.measure(work({"effops": lambda i: i}), SteadyRoof(1e9, 0.5e9, 1e9, 1e9), rounds=1)
    assert row.retries == 1 and row.results["effops"].status == "ok"


def test_wrong_failing_and_missing_candidates_are_not_timed():
    calls: dict[str, int] = {"wrong": 0}

    def wrong(i):
        calls["wrong"] += 1

    def raising(i):
        raise RuntimeError("a peer's own trouble\nand its details")

    candidates = {"effops": lambda i: i, "wrong": wrong, "nan": lambda i: i, "raises": raising, "absent": "not there"}
    ratios = {"effops": 1.0, "wrong": 1.001, "nan": float("nan")}
    row = timing.measure(work(candidates, lambda name, result: ratios[name]), SteadyRoof(1e9), rounds=2)
    assert {name: x.status for name, x in row.results.items()} == {
        "effops": "ok", "wrong": "wrong", "nan": "wrong", "raises": "wrong", "absent": "n/a",
    }  # fmt: skip
    assert calls["wrong"] == 1 and row.median("wrong") is None
    assert row.results["raises"].reason == "RuntimeError: a peer's own trouble"
    assert row.results["absent"].reason == "not there"


def test_copies_are_rotated():
    seen: list[int] = []
    timing.measure(work({"effops": lambda i: seen.append(i) or sum(range(1000))}), SteadyRoof(1e9), rounds=2)
    assert set(seen[2:]) == {0, 1}


def test_a_real_roof_sees_a_memory_and_a_gemm():
    real = roof.Roof(1 << 20)
    samples = Samples()
    real.sample(samples, torch.float32)
    assert 1e8 < samples.read[0] < 1e13 and 1e8 < samples.peak[0] < 1e15
    assert set(real.loops) >= {"torch.sum", "torch.amax"} and len(real.loops) >= 3
    assert roof.last_level_cache_bytes() >= 1 << 18


def test_a_call_that_takes_too_long_is_checked_and_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "LONGEST_SECONDS", -1.0)
    calls = []
    row = timing.measure(work({"slow": lambda i: calls.append(i)}), SteadyRoof(1e9), 3)
    assert row.results["slow"].status == "n/a" and row.results["slow"].reason.startswith("one call takes")
    assert calls == [0] and row.median("slow") is None
    wrong = timing.measure(work({"slow": lambda i: i}, check=lambda name, result: 2.0), SteadyRoof(1e9), 3)
    assert wrong.results["slow"].status == "wrong"
