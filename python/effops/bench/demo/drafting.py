"""The drafting part of the demo: the same greedy text, plain and with each drafter, on real files and on edits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch

from effops.bench.demo.forced import Forced, teacher_forced
from effops.bench.demo.prompts import Prompt
from effops.bench.demo.sides import Sides
from effops.decoding import (
    CopyDrafter,
    Drafter,
    MedusaDrafter,
    MedusaHeads,
    MergedDrafter,
    ModelDrafter,
    TokenTree,
    compare,
    generate,
    step_times,
)
from effops.models import Llama, Tokenizer
from effops.models.shipped import draft_dir, medusa_dir

PLAIN = "plain"
# The files whose acceptance chose the heads' tree, see their card.
CALIBRATION = ("bisect", "calendar", "csv", "fractions", "getpass", "gzip", "queue", "shlex")
REPEATED = 0.2  # outputs with a larger share of repeated 4-grams are shown apart and not counted
EDITS, REPEATED_PART = 0.05, 1 / 4  # tokens changed; how much of the changed copy the prompt holds


@dataclass
class Method:
    """What one drafter did for one prompt: seconds of each run's steps, tokens a step, and the judgement."""

    seconds: list[float]
    accepted: float
    judgement: str
    draft_share: float = 0.0


@dataclass
class DraftRow:
    """One prompt in one dtype. ``repeated`` is the share of the output's 4-grams that occurred before in it."""

    set: str
    prompt: Prompt
    dtype: str
    new_tokens: int
    torch_seconds: list[float]
    methods: dict[str, Method]
    repeated: float
    forced: dict[str, Forced] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        return self.repeated <= REPEATED

    def rate(self, method: str) -> float:
        """New tokens a second after the first, which the prompt's pass gives."""
        seconds = self.torch_seconds if method == "torch" else self.methods[method].seconds
        return (self.new_tokens - 1) / median(seconds)

    def as_json(self) -> dict[str, Any]:
        return {
            "set": self.set, "file": self.prompt.name, "dtype": self.dtype, "prompt_tokens": len(self.prompt.tokens),
            "new_tokens": self.new_tokens, "repeated_4grams": self.repeated, "counts": self.counts,
            "torch": {"tokens_per_second": self.rate("torch"), "seconds": self.torch_seconds},
            "methods": {
                name: {"tokens_per_second": self.rate(name), "accepted": m.accepted, "judgement": m.judgement,
                       "draft_share": m.draft_share, "seconds": m.seconds}
                for name, m in self.methods.items()
            },
            "teacher_forced": {name: vars(x) for name, x in self.forced.items()},
        }  # fmt: skip


def repeated_4grams(tokens: Sequence[int]) -> float:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def edited(prompt: Prompt, vocabulary: int) -> Prompt:
    """The file's tokens, and after them the beginning of the same with seeded changes: an edit under way."""
    generator = torch.Generator().manual_seed(len(prompt.tokens) + sum(prompt.tokens) % 1000)
    tokens = torch.tensor(prompt.tokens)
    changed = torch.rand(len(tokens), generator=generator) < EDITS
    other = torch.randint(3, vocabulary, (len(tokens),), generator=generator)
    copy = torch.where(changed, other, tokens).tolist()
    return Prompt(prompt.name, prompt.tokens + copy[: int(len(copy) * REPEATED_PART)])


def make_drafters(model: Llama, quick: bool) -> tuple[dict[str, Drafter | None], dict[str, Any]]:
    """Every drafter by name, and how the Medusa tree was chosen: the best for this machine's step times."""
    drafted = model.dtype if _slow_bf16() else torch.bfloat16
    heads = MedusaHeads.from_pretrained(medusa_dir(), dtype=drafted)
    config = json.loads((medusa_dir() / "config.json").read_text())
    acceptance = config["acceptance_greedy"]
    words = config.get("frequent_tokens")
    widest = MedusaDrafter(heads, TokenTree.optimal(acceptance, {32: 1.0}), vocabulary=words)
    times: dict[int, float] = {}
    for turn in range(1 if quick else 3):  # seconds apart: what else the machine does comes and goes
        time.sleep(2 * (turn > 0))
        now = step_times(model, (1, 2, 4) if quick else (1, 2, 3, 4, 6, 8, 12, 16), drafter=widest,
                         context=64 if quick else 576)  # fmt: skip
        times = {n: min(t, times.get(n, t)) for n, t in now.items()}
    tree = TokenTree.optimal(acceptance, times)
    chosen = {"step_ms": {n: 1e3 * t for n, t in times.items()}, "parents": tree.parents, "ranks": tree.ranks,
              "expected": tree.expected(acceptance), "heads_dtype": str(drafted).removeprefix("torch.")}  # fmt: skip
    draft = Llama.from_pretrained(draft_dir(), dtype=model.dtype)
    first = MedusaDrafter(heads, TokenTree.chain(2), vocabulary=words)
    return {
        PLAIN: None,
        "copy": CopyDrafter(block=7),
        "medusa": MedusaDrafter(heads, tree, vocabulary=words) if len(tree) > 1 else widest,
        "medusa + copy": MergedDrafter(first, CopyDrafter(gamma=2, block=3), max_nodes=4),
        "draft model": ModelDrafter(draft, 3),
    }, chosen


def _slow_bf16() -> bool:
    from effops import _host

    return bool(_host.cpu_isa() != "avx512bf16")


def measure(
    sides: Sides, set_name: str, prompts: Iterable[Prompt], drafters: dict[str, Drafter | None], tokenizer: Tokenizer,
    new_tokens: int, rounds: int, truth: dict[str, list[int]], progress: Callable[[str], None],
) -> Iterable[DraftRow]:  # fmt: skip
    """One row a prompt; the methods take turns. Judged runs, with logits, are not timed."""
    model = sides.model
    dtype = str(model.dtype).removeprefix("torch.")
    for prompt in prompts:
        seconds: dict[str, list[float]] = {name: [] for name in ("torch", *drafters)}
        methods: dict[str, Method] = {}
        plain: Any = None
        for name, drafter in drafters.items():
            progress(f"{set_name}, {prompt.name}, {dtype}: judging {name}")
            result = generate(model, [prompt.tokens], max_new_tokens=new_tokens, ignore_eos=True, drafter=drafter,
                              return_logits=True)  # fmt: skip
            assert result.logits is not None
            plain = plain or result
            if dtype == "float32":
                kind = compare(prompt.tokens, plain.tokens[0], plain.logits[0], result.tokens[0], result.logits[0],
                               sides.exact).kind  # fmt: skip
            else:
                pairs = zip(plain.tokens[0], result.tokens[0], strict=True)
                place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                kind = "same" if place is None else f"diverges at {place}"
            methods[name] = Method(seconds[name], result.stats.mean_accepted_length, kind)
        for turn in range(rounds):
            for name in seconds if turn % 2 == 0 else reversed(seconds):
                progress(f"{set_name}, {prompt.name}, {dtype}: {name}, round {turn + 1} of {rounds}")
                if name == "torch":
                    seconds[name].append(sides.run("torch", prompt.tokens, new_tokens).decode)
                    continue
                begin = time.perf_counter()
                result = generate(model, [prompt.tokens], max_new_tokens=new_tokens, ignore_eos=True,
                                  drafter=drafters[name])  # fmt: skip
                seconds[name].append(time.perf_counter() - begin - result.stats.prefill_seconds)
                methods[name].draft_share = result.stats.draft_seconds / max(result.stats.decode_seconds, 1e-9)
        row = DraftRow(set_name, prompt, dtype, new_tokens, seconds["torch"], methods,
                       repeated_4grams(plain.tokens[0]))  # fmt: skip
        if dtype == "float32" and prompt.name in truth:
            for name, drafter in drafters.items():
                if drafter is not None:
                    progress(f"{set_name}, {prompt.name}: teacher-forced {name}")
                    text, start = truth[prompt.name], len(prompt.tokens)
                    if start + 2 <= len(text):
                        row.forced[name] = teacher_forced(model, drafter, text, start, new_tokens)
        yield row


def summary(rows: list[DraftRow]) -> dict[str, Any]:
    """Totals of one set and dtype: rates of the counted rows and of the others, accepted lengths, judgements."""
    counted = [row for row in rows if row.counts]
    names = list(rows[0].methods) if rows else []
    result: dict[str, Any] = {"files": len(rows), "counted": len(counted), "methods": {}}
    for title, some in (("methods", counted), ("methods_of_repetitive", [r for r in rows if not r.counts])):
        if some:
            result[title] = {name: _totals(some, name) for name in names}
    kinds = [m.judgement for row in rows for name, m in row.methods.items() if name != PLAIN]
    result["judgements"] = {kind: kinds.count(kind) for kind in sorted(set(kinds)) if " at " not in kind}
    result["diverging"] = sum(" at " in kind for kind in kinds)
    forced = {name: [row.forced[name] for row in rows if name in row.forced] for name in names}
    result["teacher_forced"] = {
        name: {key: mean(getattr(x, key) for x in some) for key in ("model_decides", "text_decides")}
        for name, some in forced.items()
        if some
    }
    return result


def _totals(rows: list[DraftRow], name: str) -> dict[str, float]:
    def seconds(method: str) -> float:
        return sum((row.new_tokens - 1) / row.rate(method) for row in rows)

    new = sum(row.new_tokens - 1 for row in rows)
    return {
        "tokens_per_second": new / seconds(name),
        "speedup_over_plain": seconds(PLAIN) / seconds(name),
        "speedup_over_torch": seconds("torch") / seconds(name),
        "accepted": new / sum((row.new_tokens - 1) / row.methods[name].accepted for row in rows),
        "draft_share": mean(row.methods[name].draft_share for row in rows),
    }
