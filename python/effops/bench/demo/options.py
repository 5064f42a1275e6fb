"""The options of ``effops demo``; importing this needs neither torch nor the extras."""

from __future__ import annotations

import argparse
from pathlib import Path

PROMPT_TOKENS = 512  # of each held-out file


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text!r}")
    return int(text)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing directory, got {text!r}")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"expected an existing file, got {text!r}")
    return path


def _output(text: str) -> Path:
    path = Path(text)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"expected a directory that exists or can be made, got {text!r}")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_directory,
        metavar="DIR",
        help="Hugging Face directory of a Llama, Mistral, Qwen2 or Qwen3 model (default: the shipped code model)",
    )
    parser.add_argument(
        "--prompt-file",
        type=_file,
        metavar="F",
        action="append",
        help="UTF-8 text to continue; repeatable (default: the first tokens of the shipped held-out files)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_count,
        metavar="N",
        help=f"the prompt is the first N tokens of a file (default: {PROMPT_TOKENS}, or all of a --prompt-file)",
    )
    parser.add_argument("--new-tokens", type=_count, default=128, metavar="N", help="tokens to add (default 128)")
    parser.add_argument("--rounds", type=_count, default=2, metavar="N", help="timed runs of each prompt (default 2)")
    parser.add_argument("--threads", type=_count, metavar="N", help="default: torch's")
    parser.add_argument("--out", type=_output, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument("--quick", action="store_true", help="few and short prompts: does it run, not how fast")
