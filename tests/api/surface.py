"""Prints the public surface, one line a name: ``python tests/api/surface.py > tests/api/surface.txt`` records it."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import torch

MODULES = ("effops", "effops.ops", "effops.reference", "effops.nn", "effops.nn.functional", "effops.cache",
           "effops.models", "effops.decoding", "effops.integrations", "effops.integrations.transformers")  # fmt: skip


def public_names(module: types.ModuleType) -> list[str]:
    """``__all__``, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, x in vars(module).items()
        if not name.startswith("_") and getattr(x, "__module__", None) == module.__name__
    )


def signature(function: Any) -> str:
    """As ``inspect`` writes it, without the addresses of default values."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))


def schema(op: torch._ops.OpOverload) -> str:
    """As torch writes it, with floats as Python writes them, which no version of torch changes."""
    return re.sub(r"(?<==)\d+\.\d*(e-?\d+)?", lambda number: repr(float(number[0])), str(op._schema))


def class_members(cls: type) -> Iterator[str]:
    """The constructor, fields and public methods that the class itself defines."""
    if issubclass(cls, enum.Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in cls)
        return
    if "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
        yield f"    __init__{signature(cls.__init__)}"
    for name, annotation in inspect.get_annotations(cls).items():
        if not name.startswith("_"):
            yield f"    {name}: {getattr(annotation, '__forward_arg__', annotation)}"
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        inner = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(inner, property):
            yield f"    {name} (property)"
        elif inspect.isfunction(inner):
            kind = {classmethod: "classmethod ", staticmethod: "staticmethod "}.get(type(member), "")
            yield f"    {kind}{name}{signature(inner)}"


def described(name: str, x: Any) -> Iterator[str]:
    if inspect.isclass(x):
        bases = ", ".join(b.__name__ for b in x.__bases__ if b is not object)
        yield f"  class {name}({bases})"
        yield from class_members(x)
    elif callable(x):
        yield f"  {name}{signature(x)}"
    elif isinstance(x, types.ModuleType):
        yield f"  module {name}"
    elif name == "__version__":
        yield f"  {name}: str"
    else:
        yield f"  {name}: {type(x).__name__}"


def surface() -> Iterator[str]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield module_name
        for name in public_names(module):
            yield from described(name, getattr(module, name))
        yield ""
    yield "torch.ops.effops"
    for name in sorted(set(torch._C._dispatch_get_all_op_names())):
        if name.startswith("effops::"):
            yield f"  {schema(getattr(torch.ops.effops, name.removeprefix('effops::')).default)}"


if __name__ == "__main__":
    print("\n".join(surface()))
