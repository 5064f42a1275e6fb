"""The demo from its options to its files and exit code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from effops import _library
from effops.bench import record
from effops.bench.demo import drafting, experts, long_context, packed, text
from effops.bench.demo.drafting import DraftRow
from effops.bench.demo.experts import ExpertRow, ExpertSides
from effops.bench.demo.long_context import Point
from effops.bench.demo.packed import PackedRow
from effops.bench.demo.page import page
from effops.bench.demo.prompts import Prompt, collect, whole_files
from effops.bench.demo.sides import Sides
from effops.bench.demo.table import view
from effops.bench.demo.text import Row
from effops.bench.demo.verdict import Errors
from effops.models import Llama, Tokenizer, load
from effops.models.presets import qwen2_0_5b
from effops.models.shipped import model_dir

DTYPES = (torch.float32, torch.bfloat16)
NEAR_TIES = 1 / 16  # of the float32 rows, at most
STEPS, QUICK_STEPS, QUICK_CONTEXT = 15, 2, 128


class Demo:
    """What was measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows: list[Row] = []
        self.totals: dict[str, dict[str, Any]] = {}
        self.forms: dict[str, Any] = {}
        self.draft_rows: list[DraftRow] = []
        self.draft_totals: dict[str, dict[str, Any]] = {}
        self.trees: dict[str, Any] = {}
        self.expert_rows: list[ExpertRow] = []
        self.expert_totals: dict[str, dict[str, Any]] = {}
        self.without_experts = ""  # why there is no such part
        self.packed_rows: list[PackedRow] = []
        self.points: list[Point] = []
        self.problems: list[str] = []

    def measure(self, live: Live) -> None:
        def progress(doing: str) -> None:
            shown = self.draft_totals, self.expert_totals, self.packed_rows, self.points
            live.update(view(self.rows, self.totals, *shown, doing))
            if doing and not live.console.is_terminal:  # where nothing is redrawn, a log shows what is going on
                print(doing, flush=True)

        source = self.arguments.model or model_dir()
        progress(f"loading {source}")
        model, tokenizer = load(source, dtype=torch.float32)
        prompts = collect(self.arguments, model.config, tokenizer)
        for dtype in DTYPES:
            self._text(model if dtype == torch.float32 else model.to(dtype), tokenizer, prompts, progress)
        if self.arguments.model is None:
            self._experts(prompts, progress)
            self._packed(tokenizer, prompts, progress)
            self._long_context(progress)
        progress("")

    def _text(self, model: Llama, tokenizer: Tokenizer, prompts: Any, progress: Any) -> None:
        a = self.arguments
        name = str(model.dtype).removeprefix("torch.")
        progress(f"{name}: finding plain torch's fastest forms")
        sides = Sides(model, max(len(p.tokens) for p in prompts), a.new_tokens)
        self.forms[name] = sides.as_json()
        rows: list[Row] = []
        for row in text.measure(sides, prompts, tokenizer, a.new_tokens, 1 if a.quick else a.rounds, progress):
            rows.append(row)
            self.rows.append(row)
        if a.model is None:
            self._drafting(sides, tokenizer, prompts, progress)
        total = self.totals[name] = text.summary(rows)
        kinds = total["judgements"]
        if kinds.get("NO"):
            self.problems.append(f"{name}: {kinds['NO']} of {len(rows)} rows are NO")
        if kinds.get("near-tie", 0) > max(1, NEAR_TIES * len(rows)):
            self.problems.append(f"{name}: {kinds['near-tie']} of {len(rows)} rows are near-ties")
        if not all(row.repeatable for row in rows):
            self.problems.append(f"{name}: runs of the same prompt differ")
        errors = [row.judgement.errors for row in rows if row.judgement.errors]
        eps = torch.finfo(model.dtype).eps
        if errors and not Errors.together(errors).fits(model.config.num_hidden_layers, eps):
            self.problems.append(f"{name}: the logits are further from float64's than rounding explains")

    def _drafting(self, sides: Sides, tokenizer: Tokenizer, prompts: list[Prompt], progress: Any) -> None:
        """Drafters belong to the shipped model. The files that the heads' tree was chosen by take no part."""
        a, config = self.arguments, sides.model.config
        name = str(sides.model.dtype).removeprefix("torch.")
        progress(f"{name}: measuring step times for the best tree")
        drafters, self.trees[name] = drafting.make_drafters(sides.model, a.quick)
        chosen = [p for p in prompts if a.prompt_file or p.name.removesuffix(".py") not in drafting.CALIBRATION]
        chosen = prompts[:1] if a.quick else chosen
        room = config.context_length - a.new_tokens
        truth = {p.name: tokens for p, tokens in zip(prompts, whole_files(a, tokenizer), strict=True)}
        edits = [drafting.edited(p, config.vocab_size) for p in chosen]
        for title, some in (("files", chosen), ("edits", edits)):
            fitting = [p for p in some if len(p.tokens) <= room]
            rows: list[DraftRow] = []
            for row in drafting.measure(sides, title, fitting, drafters, tokenizer, a.new_tokens,
                                        1 if a.quick else a.rounds, truth if title == "files" else {},
                                        progress):  # fmt: skip
                rows.append(row)
                self.draft_rows.append(row)
                self.draft_totals[f"{title}, {name}"] = drafting.summary(rows)
            wrong = self.draft_totals.get(f"{title}, {name}", {}).get("judgements", {}).get("NO", 0)
            if wrong:
                self.problems.append(f"{title}, {name}: {wrong} drafted outputs are NO")

    def _experts(self, prompts: list[Prompt], progress: Any) -> None:
        a = self.arguments
        if importlib.util.find_spec("transformers") is None:
            self.without_experts = "the mixture of experts is compared with the transformers library, which is missing"
            return
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            progress(f"experts, {name}: loading")
            rows: list[ExpertRow] = []
            some = prompts[:1] if a.quick else experts.chosen(prompts)
            for row in experts.measure(ExpertSides(dtype), some, a.new_tokens, 1 if a.quick else a.rounds, progress):
                rows.append(row)
                self.expert_rows.append(row)
                self.expert_totals[name] = experts.summary(rows)
            self.problems += experts.problems(rows)

    def _packed(self, tokenizer: Tokenizer, prompts: list[Prompt], progress: Any) -> None:
        a = self.arguments
        some = prompts[:1] if a.quick else prompts[:: -(-len(prompts) // packed.PROMPTS)]
        for row in packed.measure(tokenizer, some, a.new_tokens, 1 if a.quick else a.rounds, a.quick, progress):
            self.packed_rows.append(row)
        self.problems += packed.problems(self.packed_rows)

    def _long_context(self, progress: Any) -> None:
        quick, config = self.arguments.quick, qwen2_0_5b()
        contexts = (QUICK_CONTEXT,) if quick else long_context.CONTEXTS
        if quick:
            config = replace(config, num_hidden_layers=2, vocab_size=1024, windows=(None, None))
        for point in long_context.measure(config, contexts, QUICK_STEPS if quick else STEPS, progress):
            self.points.append(point)
            if not point.errors.fits(config.num_hidden_layers, torch.finfo(torch.bfloat16).eps):
                self.problems.append(f"context {point.context}: logits further from float32's than rounding explains")

    def as_json(self) -> dict[str, Any]:
        return {
            **record.context(record.command()),
            "quick": self.arguments.quick,
            "model": str(self.arguments.model or "code-7m (shipped)"),
            "problems": self.problems,
            "text": {"totals": self.totals, "forms": self.forms, "rows": [row.as_json() for row in self.rows]},
            "drafting": {
                "totals": self.draft_totals,
                "trees": self.trees,
                "rows": [row.as_json() for row in self.draft_rows],
            },
            "experts": {
                "model": "code-moe-8m (shipped)",
                "missing": self.without_experts,
                "totals": self.expert_totals,
                "rows": [row.as_json() for row in self.expert_rows],
            },
            "few_bits": {"files": packed.FILES, "rows": [row.as_json() for row in self.packed_rows]},
            "long_context": {
                "model": "0.5B-class Qwen2 configuration, random weights",
                "points": [p.as_json() for p in self.points],
            },
        }


def run(arguments: argparse.Namespace) -> int:
    """Measures, writes ``demo.json`` and ``index.html`` under ``--out``; 0 if every check holds."""
    _library.require()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console()
    demo = Demo(arguments)
    with Live(console=console, refresh_per_second=4, vertical_overflow="visible") as live:
        demo.measure(live)
    result = demo.as_json()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "demo.json", json.dumps(result, indent=1) + "\n")
    _write(out / "index.html", page(result))
    if demo.without_experts:
        console.print(f"left out: {demo.without_experts} (pip install transformers)")
    for problem in demo.problems:
        console.print(f"[bold red]{problem}")
    console.print(f"page: {out / 'index.html'}   figures: {out / 'demo.json'}", soft_wrap=True)
    return 1 if demo.problems else 0


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
