"""Reports on the terminal (rich), as a file of figures (JSON) and as a drawing (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effops.models.checkpoint import written_atomically
from effops.systems.catalogue import Entry
from effops.systems.report import Curves, Report, Table


def cell(x: str | float | None) -> str:
    if x is None:
        return ""
    if isinstance(x, str):
        return x
    if isinstance(x, int) or 1e3 <= abs(x) < 1e6:
        return f"{x:,.0f}"
    return f"{x:.3f}" if 1e-3 <= abs(x) < 1e3 or x == 0 else f"{x:.3g}"


def print_report(console: Any, entry: Entry, report: Report) -> None:
    console.print(f"\n[bold]{entry.name}[/]  {entry.title} (arXiv {entry.arxiv}), on {report.model}")
    console.print(f"claim: {report.claim}")
    for table in report.tables:
        console.print()
        console.print(_table(table))
        if table.note:
            console.print(table.note, style="dim")
    console.print(f"\n[bold]{report.verdict}:[/] {report.seen}")
    console.print(f"cannot be shown at this scale: {report.unseen}")
    for problem in report.problems:
        console.print(f"[bold red]{problem}")


def _table(table: Table) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", box=None, padding=(0, 2))
    for i, column in enumerate(table.columns):
        words = any(isinstance(row[i], str) for row in table.rows)
        drawn.add_column(column, justify="left" if words else "right", no_wrap=i == 0)
    for row in table.rows:
        drawn.add_row(*map(cell, row))
    return drawn


def write_plot(path: Path, reports: Sequence[Report]) -> None:
    """Every curve of every report, two beside each other, each report in rows of its own."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pairs = [(report.system, report.curves[i : i + 2]) for report in reports for i in range(0, len(report.curves), 2)]
    rows = max(1, len(pairs))
    figure = Figure(figsize=(12, 4.4 * rows), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for (system, pair), row in zip(pairs, figure.subplots(rows, 2, squeeze=False), strict=False):
        for axes, curve in zip(row, pair, strict=False):
            _draw(axes, system, curve)
    for axes in figure.axes:
        if not axes.lines:
            axes.remove()
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")


def _draw(axes: Any, system: str, curve: Curves) -> None:
    for name, points in curve.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for style, (name, level) in zip(("--", ":", "-."), curve.levels.items(), strict=False):
        axes.axhline(level, color="black", linewidth=1, linestyle=style, label=name)
    places = sorted({x for points in curve.lines.values() for x, _ in points})
    if places and 0 < 8 * places[0] <= places[-1]:  # sizes that grow by factors
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{x:,g}" for x in places])
        axes.minorticks_off()
    axes.set_title(f"{system}: {curve.title}", pad=10)
    axes.set(xlabel=curve.x, ylabel=curve.y)
    axes.legend(fontsize="small")
