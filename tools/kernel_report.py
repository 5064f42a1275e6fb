"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them: tools/kernel_report.py [OUT.md]

Compiles each cuda/*/*.cu for one architecture (--arch 80); needs nvcc, no GPU. Exit code 1: a main kernel spills.
Dynamic shared memory is chosen at launch and not in this table.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
# What most models run: these must not spill.
MAIN = re.compile(
    r"(stream|block)_attention<.*, (64|96|128)>|scalar_attention<(64|128)>|grouped_(gradient_)?tiles<|topk_routing"
    r"|packed_linear_panels"
)
GROUPED_SHAPES = ("few", "some", "many")  # csrc/common/device_grouped_plan.h


@dataclass(frozen=True)
class Kernel:
    file: str
    name: str
    registers: int
    stack: int
    spilled: int  # bytes stored and loaded

    @property
    def fails(self) -> bool:
        return self.spilled > 0 and MAIN.search(self.name) is not None


def demangled(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for line in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|effops::device::|effops::|^void ", "", line)
        name = re.sub(r"\(GroupedShape\)(\d)", lambda m: GROUPED_SHAPES[int(m[1])], name)
        short.append(re.sub(r"\((?!int\)|bool\)).*\)$", "", name).replace("(int)", "").replace("(bool)", ""))
    return short


def kernels_of(source: Path, nvcc: str, arch: str, directory: Path) -> tuple[list[Kernel], float]:
    """Its kernels, and the seconds that compiling took. RuntimeError: it does not compile."""
    start = time.monotonic()
    command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Icuda", "-Icsrc", "-c"]
    command += [
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        "-o",
        str(directory / f"{source.stem}.o"),
        str(source),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    names, found = [], []
    stack = spilled = 0
    for line in done.stderr.splitlines():
        if entry := ENTRY.search(line):
            names.append(entry[1])
        elif spills := SPILLS.search(line):
            stack, spilled = int(spills[1]), int(spills[2]) + int(spills[3])
        elif used := USED.search(line):
            found.append((int(used[1]), stack, spilled))
    file = str(source.relative_to(ROOT))
    rows = [Kernel(file, name, *numbers) for name, numbers in zip(demangled(names), found, strict=True)]
    return rows, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="where the Markdown table goes; else it is printed")
    parser.add_argument("--arch", default="80", help="80 or 90a")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    sources = sorted((ROOT / "cuda").glob("*/*.cu"))
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda s: kernels_of(s, nvcc, arguments.arch, Path(directory)), sources))
    rows = sorted((k for kernels, _ in done for k in kernels), key=lambda k: (k.file, k.name))
    lines = ["| kernel | file | registers | stack bytes | spilled bytes |", "|---|---|---|---|---|"]
    lines += [f"| `{k.name}` | {k.file} | {k.registers} | {k.stack} | {k.spilled} |" for k in rows]
    total = sum(seconds for _, seconds in done)
    lines += ["", f"sm_{arguments.arch}, {len(rows)} kernels, {total:.0f} s of compiling on one core."]
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    for kernel in rows:
        if kernel.fails:
            print(f"{kernel.name} spills {kernel.spilled} bytes", file=sys.stderr)
    return 1 if any(k.fails for k in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
