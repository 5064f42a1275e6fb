"""A run of systems from their names to a terminal and files."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from effops.bench import record
from effops.models import Llama, Tokenizer, load
from effops.models.checkpoint import written_atomically
from effops.models.shipped import model_dir
from effops.systems.catalogue import Entry
from effops.systems.report import Report
from effops.systems.show import print_report, write_plot

SHIPPED = "code-7m (shipped)"


@dataclass
class Run:
    """What a system's ``run`` is given: a model and its tokenizer, loaded when asked for, and whom to tell how far it
    is."""

    loaded: Callable[[], tuple[Llama, Tokenizer]]
    name: str
    retrain: bool = False
    bar: Progress | None = None

    @property
    def model(self) -> Llama:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Llama, Tokenizer]:
        return self.loaded()

    def progress(self, doing: str, done: int = 0, total: int | None = None) -> None:
        """``doing`` is under way, ``done`` of ``total`` parts of it complete."""
        if self.bar is None:
            return
        if self.bar.console.is_terminal:
            if not self.bar.tasks:
                self.bar.add_task("")
            self.bar.update(self.bar.tasks[0].id, description=doing, completed=done, total=total)
        elif done == 0:  # where nothing is redrawn, a log shows what is going on
            print(doing, flush=True)


def run(entries: Sequence[Entry], arguments: argparse.Namespace) -> int:
    """Runs, prints and writes; 1 if a check failed. A claim that did not show is a result, not a failure."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    reports: list[Report] = []
    with Progress(*columns, console=console, transient=True) as bar:
        name = str(arguments.model or SHIPPED)
        loaded = partial(load, arguments.model or model_dir(), dtype=torch.float32)
        setting = Run(loaded, name, arguments.retrain, bar)
        for entry in entries:
            module = importlib.import_module(f"effops.systems.{entry.id}")
            reports.append(module.run(setting))
            print_report(console, entry, reports[-1])
    result: dict[str, Any] = {
        **record.context(record.command()),
        "reports": [report.as_json() for report in reports],
    }
    if arguments.json:
        _write(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        write_plot(arguments.plot, reports)
    return 1 if any(report.problems for report in reports) else 0


def _write(path: Path, text: str) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
