"""Plants bugs in the kernels, one at a time, and asks the core tests of the ops to notice each.

``--simt`` plants them in the CUDA kernels instead, as compiled for the host, where some have to be reported by name.

Every mutant is an exact replacement of source text that must occur exactly once, so that a change of the
sources disarms none unseen. The copy of the sources, its one build tree and hypothesis' memory are temporary.
The unchanged library must pass first. Exit code 1: a mutant survived, does not apply or does not build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cache_mutant_list import CACHE_MUTANTS
from device_mutant_list import DEVICE_MUTANTS, DeviceMutant
from mutant import Mutant
from mutant_list import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("csrc", "cuda", "third_party", "tests/cpp", "tests/simt", "CMakeLists.txt")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider")
TESTS = ("-m", "core", "tests/ops")


def mutated(mutant: Mutant, source: Path) -> str:
    """The mutated text of its file. ValueError unless the old text occurs exactly once."""
    text = (source / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: expected once in {mutant.file}, got {count} times: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    killed: bool
    by: str  # the first failed test, or why there is none
    seconds: float


class Bench:
    """A copy of the sources, its build tree and the tests on the library built there."""

    def __init__(self, directory: Path, isa: str) -> None:
        self.source, self.build_tree, self.isa = directory / "source", directory / "build", isa
        self.environment = {
            **os.environ,
            "EFFOPS_LIBRARY": str(self.build_tree / "libeffops.so"),
            "EFFOPS_CPU_ISA": isa,
            "HYPOTHESIS_STORAGE_DIRECTORY": str(directory / "hypothesis"),
        }
        self.source.mkdir()
        for name in COPIED:
            origin = ROOT / name
            (shutil.copytree if origin.is_dir() else shutil.copy)(origin, self.source / name)

    def configure(self) -> None:
        # Light optimisation: half of the time here is compiling.
        options = {
            "EFFOPS_ISAS": self.isa,
            "EFFOPS_CUDA": "off",
            "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",
            "Python_EXECUTABLE": sys.executable,
        }
        command = ["cmake", "-S", str(self.source), "-B", str(self.build_tree), "-G", "Ninja"]
        run(command + [f"-D{name}={value}" for name, value in options.items()])

    def build(self) -> None:
        run(["cmake", "--build", str(self.build_tree), "--target", "effops_ops", "--parallel", str(os.cpu_count())])

    def test(self, tests: tuple[str, ...] = TESTS, limit: float | None = None) -> tuple[int | None, str]:
        """(exit code, output) of pytest; the code is None where it ran past ``limit`` seconds."""
        command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, done.stdout + done.stderr


class DeviceBench(Bench):
    """The same of the CUDA kernels for the host; the ops library is the installed one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "")
        own = {name: value for name, value in self.environment.items() if not name.startswith("EFFOPS_")}
        self.environment = own | {
            **{name: value for name, value in os.environ.items() if name == "EFFOPS_LIBRARY"},
            "EFFOPS_BACKEND": "simt",
            "EFFOPS_SIMT_LIBRARY": str(self.build_tree / "libeffops_simt.so"),
        }

    def configure(self) -> None:
        run(["cmake", "-S", str(self.source), "-B", str(self.build_tree), "-G", "Ninja", "-DEFFOPS_SIMT=ON"])

    def build(self) -> None:
        run(["cmake", "--build", str(self.build_tree), "--target", "effops_simt", "--parallel", str(os.cpu_count())])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def verdict(code: int | None, output: str) -> tuple[bool, str]:
    """(killed, by what). Only failed tests kill, or a death of the process in them; not an error before them."""
    if code is None:
        return True, "no end in time"
    if code < 0:
        return True, f"signal {signal.Signals(-code).name}"
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
    if code == 1 and failed:
        return True, failed.group(1)
    if code == 0:
        return False, "SURVIVED"
    return False, f"NOT JUDGED, pytest exit code {code}: {output.strip().splitlines()[-1] if output.strip() else ''}"


def judge(bench: Bench, mutant: Mutant, limit: float) -> Result:
    start = time.monotonic()
    file = bench.source / mutant.file
    original = file.read_text()
    try:
        file.write_text(mutated(mutant, bench.source))
        bench.build()
        device = isinstance(mutant, DeviceMutant)
        code, output = bench.test(mutant.tests if device else TESTS, limit)
        killed, by = verdict(code, output)
        if killed and device and not re.search(mutant.report, output):
            killed, by = False, f"NOT NAMED, expected a report of {mutant.report!r}: {by}"
    except RuntimeError as error:
        killed, by = False, str(error)
    finally:
        file.write_text(original)
    return Result(mutant, killed, by, time.monotonic() - start)


def judge_all(mutants: list[Mutant], bench: Bench) -> list[Result]:
    """RuntimeError: the unchanged library does not build or pass. ValueError: a mutant does not apply."""
    for mutant in mutants:
        mutated(mutant, bench.source)
    start = time.monotonic()
    bench.configure()
    bench.build()
    built = time.monotonic()
    unchanged = {m.tests if isinstance(m, DeviceMutant) else TESTS for m in mutants}
    for tests in sorted(unchanged):
        code, output = bench.test(tests)
        if code != 0:
            raise RuntimeError(f"{output}\nthe unchanged library does not pass (pytest exit code {code})")
    seconds = time.monotonic() - built
    print(
        f"{bench.isa or 'simt'}: the unchanged library passes in {seconds:.0f} s, built in {built - start:.0f} s",
        flush=True,
    )
    results = []
    for i, mutant in enumerate(mutants):
        r = judge(bench, mutant, limit=max(120, 4 * seconds))
        print(
            f"[{i + 1}/{len(mutants)}] {mutant.name}: {'killed' if r.killed else r.by}, {r.seconds:.0f} s", flush=True
        )
        results.append(r)
    return results


def report(results: list[Result]) -> int:
    """Prints the table; the exit code."""
    print()
    for r in results:
        print(f"{r.mutant.name:32} {'killed' if r.killed else 'ALIVE':6} {r.seconds:4.0f} s  {r.by.splitlines()[0]}")
    alive = [r.mutant for r in results if not r.killed]
    for mutant in alive:
        print(f"{mutant.name} is alive: it shows with {mutant.notices}")
    print(f"{len(results) - len(alive)} of {len(results)} killed in {sum(r.seconds for r in results):.0f} s")
    return 1 if alive else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simt", action="store_true", help="in the CUDA kernels, run on the host machine")
    names = [m.name for m in (*MUTANTS, *CACHE_MUTANTS, *DEVICE_MUTANTS)]
    parser.add_argument("--only", metavar="NAME", choices=names, help="plant this one alone")
    parser.add_argument("--list", action="store_true", help="list the mutants and what should notice them")
    arguments = parser.parse_args()
    chosen = [
        m
        for m in (DEVICE_MUTANTS if arguments.simt else (*MUTANTS, *CACHE_MUTANTS))
        if arguments.only in (None, m.name)
    ]
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:32} {mutant.file:36} {mutant.notices}")
        return 0
    try:
        from effops import _host

        with tempfile.TemporaryDirectory(prefix="effops-mutants-") as directory:
            bench = DeviceBench(Path(directory)) if arguments.simt else Bench(Path(directory), _host.cpu_isa())
            return report(judge_all(chosen, bench))
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
