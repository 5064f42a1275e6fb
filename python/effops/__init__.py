"""PyTorch ops for the parts of an efficient transformer that dense libraries do badly."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "__version__", "batch_invariant", "cache", "decoding", "explain", "integrations", "models", "nn", "ops",
    "quantize_", "reference",
]  # fmt: skip

_subpackages = {"cache", "decoding", "integrations", "models", "nn", "ops", "reference"}


def __getattr__(name: str) -> ModuleType | Any:
    if name in _subpackages:
        return importlib.import_module(f"effops.{name}")
    if name == "explain":
        return importlib.import_module("effops._explain").explain
    if name == "quantize_":
        return importlib.import_module("effops.nn").quantize_
    if name == "batch_invariant":
        return importlib.import_module("effops.ops._invariance").batch_invariant
    raise AttributeError(f"module 'effops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
