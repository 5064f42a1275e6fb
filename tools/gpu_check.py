"""The stages of tools/gpu_check.sh: the ops' tests on the GPU, streams and graphs, compute-sanitizer, benchmarks.

Each stage is a process of its own with a limit of time, writes one file, and fails alone. ``--rehearse`` runs what does
not need a GPU on the host machine. The last lines of the output name what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "ops"), str(ROOT / "tests")]
# Ops without device kernels.
ONLY_CPU = ("decoder_layer", "decoder", "medusa_draft")
TESTS = ("attention_bounds", "attention_exact", "varlen", "paged", "tree_attention", "attention_gradients", "merge")
TESTS += (
    "append",
    "commit",
    "layer",
    "quantized_linear",
    "rotary_append",
    "sampling",
    "trees",
    "verify",
    "typical",
    "backend",
)


@dataclass
class Stage:
    name: str
    command: list[str]
    limit: int  # seconds
    output: str | None = None  # the file that its output goes to; None: it writes one itself


@dataclass
class Outcome:
    name: str
    ok: bool
    seconds: float
    said: str  # its last line


def stages(out: Path, rehearse: bool) -> list[Stage]:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, *(f"tests/ops/test_{name}.py" for name in TESTS)]
    calls = [sys.executable, __file__, "--calls", str(out / "calls.json")]
    if rehearse:
        return [Stage("tests", [*pytest, "tests/ops/test_backend.py"], 300, "tests.txt"), Stage("calls", calls, 120)]
    bench = [sys.executable, "-m", "effops", "bench"]
    cases = ["--device", "cuda", "--dtype", "bf16", "--json"]
    watched = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [
        Stage("tests", tests, 200, "tests.txt"),
        Stage("calls", calls, 60),
        Stage("memcheck", [*watched, "memcheck", *calls[:-1], os.devnull], 70, "memcheck.txt"),
        Stage("racecheck", [*watched, "racecheck", *calls[:-1], os.devnull], 70, "racecheck.txt"),
        Stage("attention", [*bench, "attention", *cases, str(out / "attention.json")], 70, "attention.txt"),
        Stage("tree", [*bench, "tree", *cases, str(out / "tree.json")], 70),
    ]


def execute(stage: Stage, out: Path, backend: str) -> Outcome:
    path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if stage.name == "tests" or backend == "simt":
        environment["EFFOPS_BACKEND"] = backend
    if stage.name == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or neighbours in torch's pool hide a step too far
    start = time.monotonic()
    try:
        done = subprocess.run(
            stage.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=stage.limit
        )
        ok, text = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        ok, text = False, f"{_text(late.stdout)}{_text(late.stderr)}\nstopped after {stage.limit} s"
    except OSError as error:
        ok, text = False, str(error)
    if stage.output:
        (out / stage.output).write_text(text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return Outcome(stage.name, ok, round(time.monotonic() - start, 1), last.strip()[:200])


def _text(said: bytes | str | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def moved(call: dict[str, Any], device: str, turned: bool = False) -> dict[str, Any]:
    """The arguments on a device; ``turned``: float tensors with their first dimension rolled, for other values as
    valid."""
    there = {}
    for name, x in call.items():
        if isinstance(x, torch.Tensor):
            x = x.roll(1, 0) if turned and x.is_floating_point() and x.dim() else x.clone()
            x = x.to(device)
        there[name] = x
    return there


def differences(op: Any, name: str, device: str) -> Iterator[tuple[str, bool]]:
    """(what, whether it holds): a stream of its own whose inputs come late; a graph replayed with other values."""
    from calls import CALLS, run
    from strategies.values import same_bits

    def alike(a: Any, b: Any) -> bool:
        return all(same_bits(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))

    plain = [run(op, moved(CALLS[name](), device, turned)) for turned in (False, True)]
    yield "twice the same", alike(run(op, moved(CALLS[name](), device)), plain[0])
    if device == "cpu" or "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:  # graphs need torch's pool
        return
    late = {
        n: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for n, x in moved(CALLS[name](), device).items()
    }
    ready = moved(CALLS[name](), device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        _copy(late, ready)
        got = run(op, late)
    stream.synchronize()
    yield "another stream", alike(got, plain[0])
    fixed = moved(CALLS[name](), device)
    run(op, fixed)
    torch.cuda.synchronize()
    _copy(fixed, moved(CALLS[name](), device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, fixed)
    _copy(fixed, moved(CALLS[name](), device, turned=True))
    graph.replay()
    torch.cuda.synchronize()
    yield "a graph", alike(got, plain[1])


def _copy(to: dict[str, Any], source: dict[str, Any]) -> None:
    for name, x in to.items():
        if isinstance(x, torch.Tensor):
            x.copy_(source[name])


def check_calls(out: Path) -> int:
    """An ordinary call of every op that has device kernels."""
    from calls import OPS, name_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for op in OPS:
        name = name_of(op)
        if name in ONLY_CPU:
            continue
        try:
            rows += [{"op": name, "check": what, "ok": ok} for what, ok in differences(op, name, device)]
        except Exception as error:  # the other ops still tell something
            rows.append({"op": name, "check": "runs", "ok": False, "error": f"{type(error).__name__}: {error}"})
    out.write_text(json.dumps({"device": device, "checks": rows}, indent=1) + "\n")
    wrong = [f"{row['op']}: {row['check']} {row.get('error', '')}" for row in rows if not row["ok"]]
    print(*wrong, sep="\n")
    print(f"{len(rows) - len(wrong)} of {len(rows)} checks on {device} hold")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the results")
    parser.add_argument(
        "--rehearse", action="store_true", help="what needs no GPU, on the host machine (EFFOPS_BACKEND=simt)"
    )
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)  # out: the file of that stage
    arguments = parser.parse_args()
    if arguments.calls:
        return check_calls(arguments.out)
    backend = "simt" if arguments.rehearse else "cuda"
    outcomes = []
    for stage in stages(arguments.out, arguments.rehearse):
        outcomes.append(execute(stage, arguments.out, backend))
        last = outcomes[-1]
        print(f"{'ok    ' if last.ok else 'FAILED'} {last.name}, {last.seconds:.0f} s: {last.said}", flush=True)
    head: dict[str, Any] = {"backend": backend, "torch": torch.__version__, "rehearsal": arguments.rehearse}
    if not arguments.rehearse:
        head |= {"gpu": torch.cuda.get_device_name(0), "capability": list(torch.cuda.get_device_capability(0))}
    result = head | {"stages": [asdict(o) for o in outcomes]}
    (arguments.out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = [o for o in outcomes if not o.ok]
    for o in failed:
        print(f"FAILED {o.name}: {o.said}")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} stages passed on {backend}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
