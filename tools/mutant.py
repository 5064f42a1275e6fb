"""A bug to plant in the sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``notices`` says what kind of input shows it."""

    name: str
    file: str
    old: str
    new: str
    notices: str
