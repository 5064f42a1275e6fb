"""What `effops pim` shows: systems on a workload, and sweeps over batch and length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effops.pim.lineup import Contender
from effops.pim.model import ModelShape
from effops.pim.simulate import Result, System
from effops.pim.workload import Workload

Progress = Callable[[str, float], None]
BUSY = ("processor", "pim", "bandwidth")


def systems(model: ModelShape, contenders: Sequence[Contender], split: Mapping[str, Any]) -> dict[str, System]:
    """Raises:
    ValueError: the model's weights are larger than a system's memory.
    """
    made = {c.name: System(model, c.device, scheduler=c.scheduler, **{**split, **c.options}) for c in contenders}
    for system in made.values():
        system.check_memory()
    return made


def served(
    running: Mapping[str, System],
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress,
    **options: Any,
) -> dict[str, Result]:
    """Every system on the workload."""
    found = {}
    for c in contenders:
        tell = lambda share, name=c.name: progress(f"{name}: {workload.name}", share)  # noqa: E731
        found[c.name] = running[c.name].serve(workload, balanced=c.balanced, progress=tell, **options)
    return found


def swept(
    running: Mapping[str, System], contenders: Sequence[Contender], batches: Sequence[int], lengths: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """A decode step of every system for every batch of equal lengths, and whether that lies in its memory."""
    rows = []
    for i, batch in enumerate(batches):
        progress("sweep", i / len(batches))
        for length in lengths:
            for c in contenders:
                system = running[c.name]
                channel = system.channels([length] * batch, balanced=c.balanced)
                step = system.step([length] * batch, channel=channel)
                rows.append({"system": c.name, "batch": batch, "length": length, **figures(step)})
    return rows


def figures(result: Result) -> dict[str, Any]:
    """A result as JSON, its derived rates among them."""
    rates = {"tokens_per_second": result.tokens_per_second, "joules_per_token": result.joules_per_token}
    return {**asdict(result), **rates}


def print_tables(console: Any, results: Mapping[str, Result], title: str) -> None:
    from rich.table import Table

    first = next(iter(results.values()))
    look: dict[str, Any] = {"title_justify": "left", "box": None, "padding": (0, 1), "collapse_padding": True}
    table = Table(title=title, **look)
    table.add_column("system", overflow="fold")
    for column in ("tokens/s", "times", "mJ a\ntoken", "NPU or\nGPU %", "PIM %", "band-\nwidth %", "batch",
                   "ms/token\np50", "\np99"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        gaps = [f"{1e3 * r.between_tokens[p]:.2f}" if r.between_tokens else "" for p in ("p50", "p99")]
        times = r.tokens_per_second / (first.tokens_per_second or 1)
        busy = [f"{100 * r.utilization[k]:.1f}" for k in BUSY]
        rates = [f"{r.tokens_per_second:,.0f}", f"{times:.2f}", f"{1e3 * r.joules_per_token:.2f}"]
        table.add_row(name, *rates, *busy, f"{r.mean_batch:.1f}", *gaps)
    console.print(table)
    parts = Table(title="share of the time", **look)
    names = [n for n in first.parts if any(r.parts[n] > 0 for r in results.values())]
    parts.add_column("system", overflow="fold")
    for column in names:
        parts.add_column(column, justify="right", no_wrap=True)
    for name, r in results.items():
        total = sum(r.parts.values()) or 1
        parts.add_row(name, *(f"{100 * r.parts[n] / total:.1f} %" for n in names))
    console.print()
    console.print(parts)
    for name, r in results.items():
        if r.refused:
            holds = f"which holds {r.most_tokens} tokens of a request"
            console.print(f"{name}: {r.refused} requests are larger than the memory, {holds}")


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Throughput and utilisation over the batch, and over the length of sequences, a line a system, as far as its
    memory goes."""
    from matplotlib.figure import Figure

    from effops.models.checkpoint import written_atomically

    batches, lengths = (sorted({row[key] for row in rows}) for key in ("batch", "length"))
    at_length, at_batch = lengths[len(lengths) // 2], batches[len(batches) // 2]
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3)
    views = ((panels[0], "batch", "length", at_length, batches), (panels[1], "length", "batch", at_batch, lengths))
    for axes_row, x, other, fixed, places in views:
        for axes, what in zip(axes_row, ("tokens a second", "processor busy, %", "units busy, %"), strict=True):
            for name in dict.fromkeys(row["system"] for row in rows):
                points = [row for row in rows if row["system"] == name and row[other] == fixed and row["fits"]]
                axes.plot(
                    [p[x] for p in points], [_value(p, what) for p in points], marker="o", markersize=3, label=name
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [str(p) for p in places])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set(title=f"{what}, {other} {fixed}", xlabel=x)
    panels[0][0].legend(fontsize="small")
    with written_atomically(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")


def _value(row: Mapping[str, Any], what: str) -> float:
    if what == "tokens a second":
        return float(row["tokens_per_second"])
    return 100 * float(row["utilization"]["processor" if what.startswith("processor") else "pim"])
