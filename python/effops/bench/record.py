"""What must stand beside every figure: commit, machine, library versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from effops import __version__
from effops.bench.roof import last_level_cache_bytes
from effops.commands.env import PEERS, cpu_model

VERSION = 1  # of the JSON format (bench/README.md)


def context(command: list[str]) -> dict[str, Any]:
    """The head of a recorded result."""
    return {
        "version": VERSION,
        "command": shlex.join(command),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "last_level_cache_bytes": last_level_cache_bytes(),
            "isa": _isa(),
            "platform": platform.platform(),
        },
        "libraries": {"effops": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: version for name, version in map(_version, PEERS) if version},
    }


def commit() -> str | None:
    """The source tree's commit, with ``+`` where files differ from it; None outside a source tree."""
    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return (head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))) or None


def command() -> list[str]:
    return ["effops", *sys.argv[1:]]


def _isa() -> str | None:
    try:
        from effops import _host
    except ImportError:
        return os.environ.get("EFFOPS_CPU_ISA")
    return str(_host.cpu_isa())


def _version(name: str) -> tuple[str, str | None]:
    try:
        return name, importlib.metadata.version(PEERS[name][0])
    except importlib.metadata.PackageNotFoundError:
        return name, None
