"""What the terminal shows: live tables, one a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from effops.bench.demo.experts import EAGER, HOOK, OURS
from effops.bench.demo.long_context import Point
from effops.bench.demo.packed import PLAIN, PackedRow
from effops.bench.demo.text import Row

STYLES = {"identical": "green", "same": "green", "near-tie": "yellow", "diverges": "yellow", "NO": "bold red"}

SIDES = {EAGER: "transformers, eager", HOOK: "transformers with effops", OURS: "effops"}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def view(
    rows: Sequence[Row],
    totals: dict[str, dict[str, Any]],
    drafting: dict[str, dict[str, Any]],
    experts: dict[str, dict[str, Any]],
    packed: Sequence[PackedRow],
    points: Sequence[Point],
    doing: str,
) -> RenderableType:
    """Everything measured so far, and what is being done."""
    text = _table(
        "Real text: tokens a second, prompt included", "file", "dtype", "torch", "effops", "speed-up", "judgement"
    )
    for row in rows:
        kind = row.judgement.kind
        at = "" if row.judgement.position is None else f" at {row.judgement.position}"
        text.add_row(
            row.prompt.name, row.dtype, f"{row.rate('torch'):.0f}", f"{row.rate('effops'):.0f}",
            f"{row.speedup:.2f}×", Text(kind + at, STYLES[kind]),
        )  # fmt: skip
    for dtype, total in totals.items():
        text.add_row(
            "all", dtype, *(f"{total[side]['tokens_per_second']:.0f}" for side in ("torch", "effops")),
            f"{total['speedup']:.2f}×", ", ".join(f"{n} {kind}" for kind, n in total["judgements"].items()),
            style="bold",
        )  # fmt: skip
    parts: list[RenderableType] = [text]
    if drafting:
        parts += [Text(), _drafting(drafting)]
    if experts:
        parts += [Text(), _experts(experts)]
    if packed:
        parts += [Text(), _packed(packed)]
    if points:
        steps = _table(
            "0.5B-class model, random weights, bfloat16: a decode step", "context", "torch", "effops", "speed-up"
        )
        for p in points:
            steps.add_row(
                str(p.context), *(f"{p.median(side) * 1e3:.1f} ms" for side in ("torch", "effops")), f"{p.speedup:.2f}×"
            )
        parts += [Text(), steps]
    return Group(*parts, Text(doing, "dim"))


def _experts(totals: dict[str, dict[str, Any]]) -> Table:
    """One row for each dtype and side."""
    table = _table(
        "Mixture of experts: tokens a second, prompt included", "side", "dtype", "files", "tokens/s", "over eager",
        "judgement",
    )  # fmt: skip
    for dtype, total in totals.items():
        for side, rate in total["tokens_per_second"].items():
            judged = total["judgements"].get(side, {})
            table.add_row(
                SIDES[side], dtype, str(total["prompts"]), f"{rate:.0f}",
                f"{total['speedup'][side]:.2f}×" if side in total["speedup"] else "",
                ", ".join(f"{n} {kind}" for kind, n in judged.items()),
            )  # fmt: skip
    return table


def _packed(rows: Sequence[PackedRow]) -> Table:
    table = _table(
        "Weights in few bits: tokens a second after the prompt, held-out loss", "model", "weights", "MB", "tokens/s",
        "over float32", "nats a token", "above float32",
    )  # fmt: skip
    plain = {row.model: row.rate for row in rows if row.format == PLAIN}
    for row in rows:
        first = row.format == PLAIN
        table.add_row(
            row.model, row.format, f"{row.linear_bytes / 1e6:.1f}", f"{row.rate:.0f}",
            "" if first else f"{row.rate / plain[row.model]:.2f}×", f"{row.loss:.4f}",
            "" if first else f"{row.above:+.4f} ± {row.deviation:.4f}",
        )  # fmt: skip
    return table


def _drafting(sets: dict[str, dict[str, Any]]) -> Table:
    """One row for each set, dtype and method; the files that repeat themselves are rows of their own."""
    table = _table(
        "Drafting: tokens a second after the prompt", "set", "dtype", "files", "method", "tokens/s", "over plain",
        "over torch", "tokens a step", "on true text", "judgement",
    )  # fmt: skip
    for title, total in sets.items():
        name, dtype = title.split(", ")
        judged = ", ".join(f"{n} {kind}" for kind, n in total["judgements"].items())
        if total["diverging"]:
            judged += f"{', ' if judged else ''}{total['diverging']} diverge"
        for key, files, note in (
            ("methods", total["counted"], ""),
            ("methods_of_repetitive", total["files"] - total["counted"], " (repetitive)"),
        ):
            for method, m in total.get(key, {}).items():
                forced = total["teacher_forced"].get(method)
                table.add_row(
                    name + note, dtype, str(files), method, f"{m['tokens_per_second']:.0f}",
                    f"{m['speedup_over_plain']:.2f}×", f"{m['speedup_over_torch']:.2f}×", f"{m['accepted']:.2f}",
                    f"{forced['model_decides']:.2f} / {forced['text_decides']:.2f}" if forced and not note else "",
                    judged if method == "plain" and not note else "",
                )  # fmt: skip
    return table
