"""Finds and loads the ops library. Importing effops never fails on it: the error comes, whole, with the first use."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

TORCH_FLOOR = (2, 11)
LIBRARY_NAME = "libeffops.so"


@dataclass(frozen=True)
class Status:
    """What became of the library: ``path`` where one was found, ``error`` where it does not work."""

    path: Path | None
    error: str | None

    @property
    def loaded(self) -> bool:
        return self.error is None


def find() -> Path | None:
    """The library: EFFOPS_LIBRARY, else beside the compiled module (editable installs), else beside this file."""
    forced = os.environ.get("EFFOPS_LIBRARY")
    if forced:
        return Path(forced)
    candidates = [Path(__file__).parent]
    host = importlib.util.find_spec("effops._host")
    if host is not None and host.origin:
        candidates.insert(0, Path(host.origin).parent)
    for directory in candidates:
        if (directory / LIBRARY_NAME).exists():
            return directory / LIBRARY_NAME
    return None


def _load() -> Status:
    path = find()
    if path is None:
        return Status(None, f"{LIBRARY_NAME} was not found: build it (pip install .) or set EFFOPS_LIBRARY")
    if not path.exists():
        return Status(path, f"EFFOPS_LIBRARY: {path} does not exist")
    try:
        import torch
    except Exception as e:
        return Status(path, f"torch cannot be imported: {e}")
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if version < TORCH_FLOOR:
        return Status(path, f"torch {torch.__version__} is too old: effops needs 2.11 or newer")
    try:
        torch.ops.load_library(str(path))
        torch.ops.effops.attention.default  # noqa: B018  (a library without our ops is as good as none)
    except Exception as e:
        return Status(path, f"{path.name} cannot be loaded with torch {torch.__version__}: {e}".splitlines()[0])
    return Status(path, None)


_status: Status | None = None


def status() -> Status:
    """Loads the library once and says how that went."""
    global _status
    if _status is None:
        _status = _load()
    return _status


def require() -> None:
    """Raises RuntimeError unless the library is loaded."""
    error = status().error
    if error is not None:
        raise RuntimeError(f"effops: the ops library is not available: {error} (`effops env` tells more)")
