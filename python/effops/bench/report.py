"""Measured rows as a live table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from effops.bench.timing import Row

COLUMNS = ("case", "candidate", "computes", "status", "reason", "milliseconds", "spread", "rate", "unit", "of_floor",
           "of_effops", "error_over_bound", "rounds")  # fmt: skip


def entries(row: Row) -> Iterable[dict[str, Any]]:
    """One dictionary of COLUMNS a candidate; figures are None unless its status is ok."""
    own = row.median("effops")
    for name, result in row.results.items():
        time, other = row.median(name), row.work.others.get(name)
        yield {
            "case": row.work.name,
            "candidate": name,
            "computes": other.computes if other else "",
            "status": result.status,
            "reason": result.reason,
            "milliseconds": time and time * 1e3,
            "spread": row.spread(name) if time else None,
            "rate": row.rate(name),
            "unit": "GB/s" if row.bound_by_memory(name) else "GFLOP/s",
            "of_floor": row.floor_of(name) / time if time else None,
            "of_effops": own / time if time and own else None,
            "error_over_bound": result.check,
            "rounds": len(result.times),
        }


def as_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.work.name,
        **row.work.fields,
        "bytes": row.work.bytes,
        "flops": row.work.flops,
        "copies": row.work.copies,
        "read_gb_s": [x / 1e9 for x in row.samples.read],
        "peak_gflop_s": [x / 1e9 for x in row.samples.peak],
        "drift": row.drift,
        "void": row.void,
        "retries": row.retries,
        "floor_ms": row.floor * 1e3,
        "results": {e.pop("candidate"): {k: x for k, x in e.items() if k != "case"} for e in entries(row)},
    }


def write_json(path: Path, context: dict[str, Any], rows: list[Row], **more: Any) -> None:
    text = json.dumps({**context, "rows": [as_json(r) for r in rows], **more}, indent=1)
    _replace(path, lambda temporary: temporary.write_text(text + "\n"))


def write_csv(path: Path, rows: list[Row]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(entry for row in rows for entry in entries(row))

    _replace(path, write)


def write_plot(path: Path, rows: list[Row]) -> None:
    """Bars of achieved / floor, one group a case."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row.results))
    figure = Figure(figsize=(9, 1.2 + 0.13 * (len(names) + 2) * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [
            (at + i * height, row.floor_of(name) / time)
            for at, row in enumerate(rows)
            if name in row.results and (time := row.median(name)) is not None
        ]
        if not bars:
            continue
        axes.barh(
            [y for y, _ in bars], [x for _, x in bars], height, label=name, color=f"C{i % 10}", hatch="///" * (i // 10)
        )
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(rows))], [row.work.name for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("achieved / floor (1: the hardware's limit)")
    axes.legend(loc="lower right")
    _replace(path, lambda temporary: figure.savefig(temporary, format=path.suffix.lstrip(".") or "png"))


def _replace(path: Path, write: Any) -> None:
    """Writes under a temporary name and moves it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def tables(rows: list[Row], pending: str = "") -> Any:
    """The rows so far, one small table a case."""
    from rich.console import Group
    from rich.text import Text

    parts = [part for row in rows for part in (_table(row), Text(_floor_line(row), "dim"), Text())]
    return Group(*parts, *([Text(f"measuring {pending}", "dim")] if pending else []))


def _floor_line(row: Row) -> str:
    work, samples = row.work, row.samples
    roof = f"R {median(samples.read) / 1e9:.3g} GB/s, P {median(samples.peak) / 1e9:.3g} GFLOP/s"
    others = "; ".join(f"{name}: {other.computes}" for name, other in work.others.items())
    return (
        f"floor {row.floor * 1e3:.3g} ms ({work.bytes / 1e6:.4g} MB, {work.flops / 1e9:.3g} GFLOP); {roof}, "
        f"drift {row.drift:.0%}, {row.retries} retries"
        + f"\n* not the case, and of its own floor: {others}"
        * bool(others)
    )


def _table(row: Row) -> Any:
    from rich.table import Table

    table = Table(title=row.work.name, title_justify="left", box=None, padding=(0, 2))
    table.add_column("", min_width=10)
    for heading in ("ms", "±", "rate", "of floor", "effops is"):
        table.add_column(heading, justify="right")
    for entry in entries(row):
        name = entry["candidate"] + " *" * bool(entry["computes"])
        if entry["status"] != "ok":
            table.add_row(name, entry["status"], style="dim" if entry["status"] == "n/a" else "red")
            continue
        ratio = "" if name == "effops" or not entry["of_effops"] else f"{1 / entry['of_effops']:.2f}× as fast"
        table.add_row(
            name,
            f"{entry['milliseconds']:.3g}",
            f"{entry['spread']:.0%}",
            f"{entry['rate']:.3g} {entry['unit']}",
            f"{entry['of_floor']:.2f}",
            ratio,
            style="bold" if name == "effops" else "",
        )
    return table
