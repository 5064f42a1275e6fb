"""``effops selftest``: every op against the reference on this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import groupby


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all-isas", action="store_true", help="every instruction set of this processor, one after another"
    )


def run(arguments: argparse.Namespace) -> int:
    from effops import _library

    _library.require()
    return _all_isas() if arguments.all_isas else _this_isa()


def _this_isa() -> int:
    from effops.bench.selftest import cases

    start, failures, total = time.perf_counter(), [], 0
    print(f"instruction set: {_isa()}", flush=True)
    for (op, dtype), family in groupby(cases(), key=lambda case: (case.op, case.name.split()[0])):
        begin, count, largest = time.perf_counter(), 0, 0.0
        for case in family:
            try:
                ratio, reason = case.run(), "outside its bound"
            except Exception as error:  # a case that raises has failed; the others still run
                ratio, reason = float("inf"), str(error)
            count, largest = count + 1, max(largest, ratio)
            if not ratio <= 1:
                failures.append(case)
                print(f"FAILED {case.op}: {case.name}: error / bound = {ratio:.3g} ({reason})", flush=True)
        total += count
        seconds = time.perf_counter() - begin
        print(f"{op:<27}{dtype:<5}{count:>3} cases, error / bound up to {largest:.2g}, {seconds:.1f} s", flush=True)
    seconds = time.perf_counter() - start
    print(f"{total - len(failures)} of {total} cases passed in {seconds:.0f} s")
    return 1 if failures else 0


def _isa() -> str:
    try:
        from effops import _host
    except ImportError:
        return os.environ.get("EFFOPS_CPU_ISA", "chosen by the library (the host module, which names it, is missing)")
    return str(_host.cpu_isa())


def _all_isas() -> int:
    from effops import _host

    codes = []
    for isa in _host.cpu_isas():
        child = subprocess.run([sys.executable, "-m", "effops", "selftest"], env=os.environ | {"EFFOPS_CPU_ISA": isa})
        codes.append(child.returncode)
    return 1 if any(codes) else 0
