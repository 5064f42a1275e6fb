"""What running a system gives: tables, curves and a verdict on the paper's claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["seen", "partly seen", "not seen"]


@dataclass(frozen=True)
class Table:
    """Rows of cells under ``columns``; numbers are shown with three digits, None as a blank."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """One drawing: points (x, y) by the name of their line; ``levels`` are horizontal lines."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """``claim`` is the paper's, ``verdict`` and ``seen`` say how much of it showed, ``unseen`` what this scale cannot
    show; ``problems`` are checks that failed, which no scale excuses."""

    system: str
    model: str
    claim: str
    tables: Sequence[Table]
    curves: Sequence[Curves]
    verdict: Verdict
    seen: str
    unseen: str
    problems: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
