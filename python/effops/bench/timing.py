"""Timing by rounds: every candidate once a round, so that all see the same minute; the roof between the rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from effops.bench import roof as limits
from effops.bench.roof import Roof, Samples, seconds
from effops.bench.work import Call, Other, Result, Work

RETRIES = 3
BLOCK_SECONDS = 1e-2  # short calls follow each other for so long, as in a model: the first wakes the other threads
SLOW_SECONDS = 0.5  # calls longer than this are timed in three rounds only
LONGEST_SECONDS = 10.0  # calls longer than this are not timed at all


@dataclass
class Row:
    """The measured row: results by candidate, the samples of the roof, and how often it was repeated as void."""

    work: Work
    samples: Samples
    results: dict[str, Result]
    retries: int

    @property
    def floor(self) -> float:
        return self.samples.floor(self.work.bytes, self.work.flops)

    @property
    def drift(self) -> float:
        """How far apart the samples' floors are, of the case or of what stands beside it."""
        return _drift(self.work, self.samples)

    @property
    def void(self) -> bool:
        return self.drift > limits.MAX_DRIFT

    @property
    def memory_bound(self) -> bool:
        return self.bound_by_memory("effops")

    def bound_by_memory(self, name: str) -> bool:
        cost = self._cost(name)
        return self.samples.floor(cost.bytes, 0) >= self.samples.floor(0, cost.flops)

    def floor_of(self, name: str) -> float:
        """The floor of what the candidate computes: the row's, unless it computes something else."""
        cost = self._cost(name)
        return self.samples.floor(cost.bytes, cost.flops)

    def rate(self, name: str) -> float | None:
        """GB/s where memory binds, GFLOP/s where arithmetic does."""
        time, cost = self.median(name), self._cost(name)
        return None if time is None else (cost.bytes if self.bound_by_memory(name) else cost.flops) / time / 1e9

    def _cost(self, name: str) -> Work | Other:
        return self.work.others.get(name, self.work)

    def median(self, name: str) -> float | None:
        times = self.results[name].times
        return median(times) if self.results[name].status == "ok" and times else None

    def spread(self, name: str) -> float:
        """Half the distance of the quartiles, relative to the median."""
        times = self.results[name].times
        if len(times) < 2:
            return 0.0
        low, _, high = quantiles(times, n=4)
        return (high - low) / 2 / median(times)


def measure(work: Work, roof: Roof, rounds: int) -> Row:
    """Checks every candidate's result, then times those that are right; a void row is measured again."""
    results = {name: _checked(work, name, call) for name, call in work.candidates.items()}
    calls = {name: work.candidates[name] for name, result in results.items() if result.status == "ok"}
    for retries in range(RETRIES + 1):  # noqa: B007
        samples = Samples()
        times = _timed(work, {n: c for n, c in calls.items() if not isinstance(c, str)}, roof, rounds, samples)
        if (moved := _drift(work, samples)) <= limits.MAX_DRIFT:
            break
    for name, result in results.items():
        if name in times:
            result.times = times[name]
            if moved > limits.MAX_DRIFT:
                result.status, result.reason = "void", f"bandwidth or peak drifted by {moved:.0%}"
    return Row(work.without_operands(), samples, results, retries)


def _drift(work: Work, samples: Samples) -> float:
    costs: list[Work | Other] = [work, *work.others.values()]
    return max(samples.drift(cost.bytes, cost.flops) for cost in costs)


def _checked(work: Work, name: str, call: Call | str) -> Result:
    if isinstance(call, str):
        return Result("n/a", call)
    try:
        begin = time.perf_counter()
        result = call(0)
        taken = time.perf_counter() - begin
        ratio = work.check(name, result)
    except Exception as error:  # whatever a peer raises, the row goes on without it
        return Result("wrong", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if not ratio <= 1:
        return Result("wrong", f"error / bound = {ratio:.3g}", ratio)
    if taken > LONGEST_SECONDS:
        return Result("n/a", f"one call takes {taken:.0f} s", ratio)
    return Result("ok", check=ratio)


def _timed(work: Work, calls: dict[str, Call], roof: Roof, rounds: int, samples: Samples) -> dict[str, list[float]]:
    once = {name: seconds(partial(call, 1 % work.copies), roof.device) for name, call in calls.items()}  # warm-up
    block = {name: max(1, math.ceil(BLOCK_SECONDS / max(t, 1e-9))) for name, t in once.items()}
    blocks: dict[str, Callable[[int], Any]] = {
        name: partial(_block, call, block[name], work.copies) for name, call in calls.items()
    }
    if roof.device == "cuda":
        blocks = {name: _captured(run) for name, run in blocks.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    roof.sample(samples, work.dtype)
    turn = 0
    for i in range(rounds):
        for name, run in blocks.items():
            if once[name] > SLOW_SECONDS and i >= 3:
                continue
            turn += block[name]
            times[name].append(seconds(partial(run, turn), roof.device) / block[name])
        roof.sample(samples, work.dtype)
    return times


def _block(call: Call, count: int, copies: int, first: int) -> Any:
    for i in range(first, first + count):
        result = call(i % copies)
    return result


def _captured(run: Callable[[int], Any]) -> Callable[[int], Any]:
    """The block as a CUDA graph, so that the GPU's time is measured and not the host's; as it is where it cannot be
    captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run(0)
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return lambda first: graph.replay()
