"""The first part of the demo: continuations of real text, timed in turns and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from effops.bench.demo.prompts import Prompt
from effops.bench.demo.sides import NAMES, Run, Sides
from effops.bench.demo.verdict import Errors, Judgement, judge
from effops.models import Tokenizer


@dataclass
class Row:
    """One prompt in one dtype: every timed run, without its logits, and the judgement on the last ones."""

    prompt: Prompt
    dtype: str
    runs: dict[str, list[Run]]
    judgement: Judgement
    repeatable: bool
    texts: dict[str, str]

    @property
    def new_tokens(self) -> int:
        return len(self.runs["effops"][0].tokens)

    def seconds(self, side: str) -> float:
        return median(run.seconds for run in self.runs[side])

    def rate(self, side: str) -> float:
        """New tokens a second, prompt included."""
        return self.new_tokens / self.seconds(side)

    @property
    def speedup(self) -> float:
        return self.seconds("torch") / self.seconds("effops")

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.prompt.name,
            "dtype": self.dtype,
            "prompt_tokens": len(self.prompt.tokens),
            "new_tokens": self.new_tokens,
            "speedup": self.speedup,
            **{
                side: {
                    "tokens_per_second": self.rate(side),
                    "prefill_seconds": [run.prefill for run in self.runs[side]],
                    "decode_seconds": [run.decode for run in self.runs[side]],
                    "text": self.texts[side],
                }
                for side in NAMES
            },
            "repeatable": self.repeatable,
            "judgement": self.judgement.as_json(),
        }


def measure(
    sides: Sides, prompts: Iterable[Prompt], tokenizer: Tokenizer, new_tokens: int, rounds: int,
    progress: Callable[[str], None],
) -> Iterable[Row]:  # fmt: skip
    """One row a prompt. Who goes first changes from round to round and from prompt to prompt."""
    for number, prompt in enumerate(prompts):
        if number == 0:
            for side in NAMES:  # warm-up
                progress(f"{prompt.name}: warming up {side}")
                sides.run(side, prompt.tokens, new_tokens)
        runs: dict[str, list[Run]] = {side: [] for side in NAMES}
        for i in range(rounds):
            for side in NAMES if (number + i) % 2 == 0 else reversed(NAMES):
                progress(f"{prompt.name}: {side}, round {i + 1} of {rounds}")
                runs[side].append(sides.run(side, prompt.tokens, new_tokens))
        progress(f"{prompt.name}: judging against float64")
        judgement = judge(sides.exact, prompt.tokens, runs["torch"][-1], runs["effops"][-1])
        yield Row(
            prompt,
            str(sides.model.dtype).removeprefix("torch."),
            {side: [Run(r.tokens, r.logits[:0], r.prefill, r.decode) for r in done] for side, done in runs.items()},
            judgement,
            all(run.tokens == done[0].tokens for done in runs.values() for run in done),
            {side: tokenizer.decode(runs[side][-1].tokens) for side in NAMES},
        )


def summary(rows: list[Row]) -> dict[str, Any]:
    """Totals of all rows of one dtype."""
    result: dict[str, Any] = {"prompts": len(rows), "new_tokens": sum(r.new_tokens for r in rows)}
    for side in NAMES:
        runs = [run for row in rows for run in row.runs[side]]
        new = sum(len(run.tokens) for run in runs)
        result[side] = {
            "tokens_per_second": new / sum(run.seconds for run in runs),
            "decode_tokens_per_second": (new - len(runs)) / max(sum(run.decode for run in runs), 1e-9),
            "prefill_tokens_per_second": sum(len(r.prompt.tokens) * len(r.runs[side]) for r in rows)
            / sum(run.prefill for run in runs),
        }
    for name in ("tokens_per_second", "decode_tokens_per_second", "prefill_tokens_per_second"):
        result[name.replace("tokens_per_second", "speedup")] = result["effops"][name] / result["torch"][name]
    ratios = sorted(row.speedup for row in rows)
    quartiles = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    result["speedup_of_prompts"] = {
        "lowest": ratios[0], "quartile_1": quartiles[0], "median": median(ratios), "quartile_3": quartiles[2],
        "highest": ratios[-1],
    }  # fmt: skip
    kinds = [row.judgement.kind for row in rows]
    result["judgements"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    result["divergences_per_1000_tokens"] = (
        1000 * sum(r.judgement.position is not None for r in rows) / sum(r.judgement.judged for r in rows)
    )
    errors = [row.judgement.errors for row in rows if row.judgement.errors]
    if errors:
        result["errors"] = vars(Errors.together(errors))
    return result
