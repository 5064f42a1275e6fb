"""The checks that tools/gpu_check.sh runs on a GPU: merge_states against the reference, streams, graphs, a benchmark.

Written to be run on the first GPU at hand: until a recorded run exists, nothing here is known to pass.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from effops import _library, ops, reference
from effops.reference.bounds import merge_states_bound

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = ((1, 1, 1), (2, 7, 3, 33), (64, 5, 128), (3, 0, 16))  # [P, ..., D]
LARGE = ((3, 1000, 4, 256), (2, 300_000, 16))  # the last has more rows than one grid


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """outs and lses on the host, with absent parts and, where there are rows, one row without any part."""
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(shape, generator=generator).to(dtype)
    lses = (8 * torch.randn(shape[:-1], generator=generator)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    lses[torch.rand(lses.shape, generator=generator) < 0.2] = -torch.inf
    lses.view(shape[0], -1)[:, :1] = -torch.inf
    return outs, lses


def worst(outs: torch.Tensor, lses: torch.Tensor, got: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The worst error over its bound of a result for host inputs."""
    bounds = merge_states_bound(outs, lses)
    return max(interval.worst(result.cpu()) for interval, result in zip(bounds, got, strict=True))


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    outs, lses = inputs(shape, dtype)
    return worst(outs, lses, ops.merge_states(outs.cuda(), lses.cuda()))


def strided() -> float:
    outs, lses = inputs((4, 9, 6, 40), torch.bfloat16)
    turned = outs.transpose(1, 2).contiguous().cuda().transpose(1, 2)
    return worst(outs, lses, ops.merge_states(turned, lses.cuda()))


def other_stream() -> float:
    """The inputs arrive late on a stream of their own: a kernel on any other stream reads zeros."""
    outs, lses = inputs((4, 50, 64), torch.float32)
    late_outs, late_lses = torch.zeros_like(outs).cuda(), torch.zeros_like(lses).cuda()
    ready_outs, ready_lses = outs.cuda(), lses.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_outs.copy_(ready_outs)
        late_lses.copy_(ready_lses)
        got = ops.merge_states(late_outs, late_lses)
    stream.synchronize()
    return worst(outs, lses, got)


def graph() -> float:
    """A first call outside, a second one captured; the replay sees new values in the same memory."""
    outs, lses = inputs((4, 50, 64), torch.bfloat16)
    static_outs, static_lses = outs.cuda(), lses.cuda()
    ops.merge_states(static_outs, static_lses)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = ops.merge_states(static_outs, static_lses)
    outs, lses = inputs((4, 50, 64), torch.bfloat16, seed=1)
    static_outs.copy_(outs)
    static_lses.copy_(lses)
    captured.replay()
    torch.cuda.synchronize()
    return worst(outs, lses, got)


def gradient() -> float:
    """Both sides run the same float64 formula: 1e-12 of the largest entry covers their roundings."""
    outs, lses = inputs((3, 20, 16), torch.float64)
    found = []
    for device, function in (("cuda", ops.merge_states), ("cpu", reference.merge_states)):
        leaves = [x.to(device).requires_grad_() for x in (outs, lses)]
        out, lse = function(*leaves)
        found.append(torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves))
    pairs = list(zip(*found, strict=True))
    return max(((a.cpu() - b).abs().max() / (1e-12 * (1 + b.abs().max()))).item() for a, b in pairs)


def refusal() -> float:
    """An op without a CUDA kernel says so; it does not run elsewhere."""
    x = torch.ones(1, 1, 1, 16, device="cuda")
    try:
        ops.attention(x, x, x)
    except RuntimeError as error:
        return 0.0 if "CUDA" in str(error) else float("inf")
    return float("inf")


def checks(small: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    for dtype in DTYPES:
        for shape in SMALL if small else SMALL + LARGE:
            yield f"merge_states {dtype} {list(shape)}", lambda s=shape, d=dtype: on_gpu(s, d)
    yield "merge_states strided", strided
    if not small:
        yield "merge_states on another stream", other_stream
        yield "merge_states in a CUDA graph", graph
        yield "merge_states gradient", gradient
        yield "attention is refused", refusal


def run_checks(small: bool) -> list[dict[str, Any]]:
    results = []
    for name, check in checks(small):
        try:
            ratio, error = check(), ""
        except Exception as raised:  # the other checks still tell something
            ratio, error = float("inf"), f"{type(raised).__name__}: {raised}"
        results.append({"name": name, "ok": ratio <= 1, "error_over_bound": ratio if ratio < float("inf") else None})
        results[-1] |= {"error": error} if error else {}
        print(f"{'ok    ' if ratio <= 1 else 'FAILED'} {name}: error / bound = {ratio:.3g} {error}", flush=True)
    return results


def sanitize() -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": None, "reason": "compute-sanitizer is not there"}
    command = [tool, "--error-exitcode", "1", sys.executable, __file__, "--small"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"ok": done.returncode == 0, "tail": done.stdout.splitlines()[-5:]}


def seconds(call: Callable[[], Any]) -> float:
    """Median of 20 event-timed calls after two to warm up."""
    times = []
    for _ in range(22):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times[2:])


def benchmark() -> dict[str, float]:
    """8 parts of 65536 rows, far more than the caches hold, beside a copy of as many bytes and the reference."""
    outs = torch.randn(8, 65536, 128, device="cuda", dtype=torch.bfloat16)
    lses = torch.randn(8, 65536, device="cuda")
    bytes_ = outs.nbytes + lses.nbytes + (outs.nbytes + lses.nbytes) // 8
    copied = torch.empty(bytes_ // 2, dtype=torch.uint8, device="cuda")  # read and written: as many bytes again
    target = torch.empty_like(copied)
    rates = {
        "merge_states_gb_s": bytes_ / seconds(lambda: ops.merge_states(outs, lses)) / 1e9,
        "copy_gb_s": bytes_ / seconds(lambda: target.copy_(copied)) / 1e9,
        "reference_gb_s": bytes_ / seconds(lambda: reference.merge_states(outs, lses)) / 1e9,
    }
    print(", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", help="where the result goes")
    parser.add_argument("--small", action="store_true", help="the small shapes only, for compute-sanitizer")
    arguments = parser.parse_args()
    _library.require()
    results = run_checks(arguments.small)
    passed = all(r["ok"] for r in results)
    if arguments.small:
        return 0 if passed else 1
    report = {
        "device": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "library": str(_library.find()),
        "checks": results,
        "sanitizer": sanitize(),
        "benchmark": benchmark() if passed else "not run: a check failed",
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = not passed or report["sanitizer"]["ok"] is False
    print(f"{sum(r['ok'] for r in results)} of {len(results)} checks passed, sanitizer: {report['sanitizer']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
