"""A benchmark run from parsed arguments to a table and files."""

from __future__ import annotations

import argparse
import gc
import sys
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from effops.bench import attention, cascade, linear, model, moe, record, report, sparse, streaming, tree
from effops.bench.overhead import host_cost
from effops.bench.roof import BUFFER_BYTES, GPU_BUFFER_BYTES, Roof
from effops.bench.timing import Row, measure
from effops.commands.bench import sizes_given

QUICK_BUFFER_BYTES = 128 << 20
BY_HEADS = (attention.Case, cascade.Case, sparse.Case, streaming.Case, tree.Case)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a result was wrong."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    families: dict[str, Any] = {
        "attention": attention, "cascade": cascade, "linear": linear, "model": model, "moe": moe, "sparse": sparse,
        "streaming": streaming, "tree": tree,
    }  # fmt: skip
    module = families[arguments.family]
    cases = _cases(module, arguments)
    device = getattr(arguments, "device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected cpu, got cuda: torch {torch.__version__} sees no GPU")
    peers = tuple(dict.fromkeys(arguments.peer or (module.PEERS if device == "cpu" else module.GPU_PEERS)))
    head = record.context(record.command())
    if head["machine"]["load_average"] > 0.5:
        print(f"effops bench: other programs are running (load {head['machine']['load_average']:.1f})", file=sys.stderr)
    more: dict[str, Any] = {"loops": arguments.loops} if arguments.family == "attention" else {}
    if device != "cpu":
        more["device"] = device
    full = BUFFER_BYTES if device == "cpu" else GPU_BUFFER_BYTES
    roof = Roof(QUICK_BUFFER_BYTES if arguments.quick else full, device)
    console = Console()
    rows: list[Row] = []
    extra: dict[str, Any] = {"quick": arguments.quick, "read_loops": list(roof.loops)}
    if device == "cuda":
        extra["gpu"] = torch.cuda.get_device_name(0)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        for case in cases:
            live.update(report.tables(rows, case.name))
            if not console.is_terminal:  # where nothing is redrawn, a log shows how far it is
                print(f"{case.name} ({len(rows) + 1} of {len(cases)})", file=sys.stderr, flush=True)
            rows.append(measure(module.work(case, peers, **more), roof, arguments.repeat))
            if arguments.json:  # a run that is cut off keeps its rows
                report.write_json(arguments.json, head, rows, **extra)
            gc.collect()  # the next case may need the memory of this one's copies
    console.print(report.tables(rows))
    if arguments.family == "attention" and device == "cpu":
        extra["host_cost_us"] = host_cost(0.01 if arguments.quick else 0.2)
        console.print("host cost of a call, µs: " + ", ".join(f"{n} {t:.1f}" for n, t in extra["host_cost_us"].items()))
    _write(arguments, head, rows, extra)
    return _verdict(rows)


def _cases(module: Any, arguments: argparse.Namespace) -> list[Any]:
    dtypes = tuple(dict.fromkeys(arguments.dtype or ("bfloat16", "float32")))
    sizes = sizes_given(arguments)
    if sizes:
        cases = [module.Case(dtype, **sizes) for dtype in dtypes]
    else:
        cases = list((module.quick_cases if arguments.quick else module.default_cases)(dtypes))
    for case in cases:
        if isinstance(case, BY_HEADS) and case.heads % case.kv_heads:
            raise ValueError(f"--kv-heads: expected a divisor of {case.heads} heads, got {case.kv_heads}")
        if isinstance(case, streaming.Case) and case.full > case.kv_heads:
            raise ValueError(f"--full: expected at most {case.kv_heads} (--kv-heads), got {case.full}")
        if isinstance(case, cascade.Case) and case.shared_len % cascade.PAGE:
            raise ValueError(f"--shared-len: expected a multiple of {cascade.PAGE}, got {case.shared_len}")
        if isinstance(case, moe.Case) and case.k > case.experts:
            raise ValueError(f"--k: expected at most {case.experts} (--experts), got {case.k}")
        if isinstance(case, attention.Case) and case.q_len > case.kv_len:
            raise ValueError(f"--q-len: expected at most --kv-len = {case.kv_len}, got {case.q_len}")
        if isinstance(case, tree.Case) and case.nodes > min(case.kv_len, tree.MAX_NODES):
            limit = min(case.kv_len, tree.MAX_NODES)
            raise ValueError(f"--nodes: expected at most {limit} (--kv-len = {case.kv_len}), got {case.nodes}")
    return cases


def _write(arguments: argparse.Namespace, head: dict[str, Any], rows: list[Row], extra: dict[str, Any]) -> None:
    if arguments.json:
        report.write_json(arguments.json, head, rows, **extra)
    if arguments.csv:
        report.write_csv(arguments.csv, rows)
    if arguments.plot:
        report.write_plot(arguments.plot, rows)


def _verdict(rows: list[Row]) -> int:
    absent = Counter((name, x.reason) for row in rows for name, x in row.results.items() if x.status == "n/a")
    for (name, reason), count in absent.items():
        print(f"n/a {name}: {reason}" + (f" ({count} of {len(rows)} rows)" if count < len(rows) else ""))
    wrong = [(row.work.name, name, x.reason) for row in rows for name, x in row.results.items() if x.status == "wrong"]
    for case, name, reason in wrong:
        print(f"effops bench: WRONG: {name}: {case}: {reason}", file=sys.stderr)
    void = sum(row.void for row in rows)
    if void:
        print(f"effops bench: {void} of {len(rows)} rows are void: the machine was too unsteady", file=sys.stderr)
    return 1 if wrong else 0
