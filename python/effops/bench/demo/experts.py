"""The third part of the demo: the shipped mixture of experts continues real text, against the Transformers library.

Three sides have the same weights: the library with its own loop over experts; the library with effops' attention and
experts plugged in; and effops' own model. All three decode step by step with a growing cache; the judge is the library
in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from effops.bench.demo.prompts import Prompt
from effops.bench.demo.sides import Run
from effops.bench.demo.verdict import Errors, Judgement, judge
from effops.decoding import generate
from effops.models import Mixtral, load_model
from effops.models.shipped import moe_dir

EAGER, HOOK, OURS = "eager", "eager + effops", "effops"
NAMES = (EAGER, HOOK, OURS)
POSITIONS = 256  # of logits in a short type, at least, before errors are compared
FILES = 8  # of the held-out ones, spread evenly: the library's steps are slow


class ExpertSides:
    """The three sides in one dtype. Importing the library takes seconds, so that it happens here."""

    def __init__(self, dtype: torch.dtype) -> None:
        import effops.integrations.transformers as integration

        integration.register()
        self.eager = _library_model(dtype)
        self.hook = _library_model(dtype, attn_implementation="effops", experts_implementation="effops")
        integration.pack_experts_(self.hook)
        model = load_model(moe_dir(), dtype=dtype)
        assert isinstance(model, Mixtral)
        self.model = model.pack_experts_()
        self._exact = _library_model(torch.float64)

    def exact(self, ids: Tensor) -> Tensor:
        """Logits [B,T,V] in float64."""
        return self._exact(ids).logits

    def run(self, side: str, prompt: Sequence[int], count: int) -> Run:
        if side == OURS:
            return self._ours(prompt, count)
        return _library_run(self.eager if side == EAGER else self.hook, prompt, count)

    def _ours(self, prompt: Sequence[int], count: int) -> Run:
        begin = time.perf_counter()
        result = generate(self.model, [list(prompt)], max_new_tokens=count, ignore_eos=True, return_logits=True)
        seconds = time.perf_counter() - begin
        assert result.logits is not None
        prefill = result.stats.prefill_seconds
        return Run(result.tokens[0], result.logits[0], prefill, seconds - prefill)


def _library_model(dtype: torch.dtype, **choices: str) -> Any:
    from transformers import AutoModelForCausalLM

    choices = {"attn_implementation": "sdpa", "experts_implementation": "eager", **choices}
    return AutoModelForCausalLM.from_pretrained(moe_dir(), dtype=dtype, **choices).eval()


@torch.inference_mode()
def _library_run(model: Any, prompt: Sequence[int], count: int) -> Run:
    from transformers import DynamicCache

    cache, logits, chosen = DynamicCache(config=model.config), [], []
    ids = torch.tensor([list(prompt)])
    begin = middle = time.perf_counter()
    for step in range(count):
        logits.append(model(ids, past_key_values=cache, logits_to_keep=1).logits[0])
        ids = logits[-1].argmax(-1, keepdim=True)
        chosen.append(ids[0])
        if step == 0:
            middle = time.perf_counter()
    tokens = torch.cat(chosen).tolist()
    end = time.perf_counter()
    return Run(tokens, torch.cat(logits), middle - begin, end - middle)


@dataclass
class ExpertRow:
    """One prompt in one dtype: seconds of every run of every side, and the judgement on each side of ours."""

    prompt: Prompt
    dtype: str
    new_tokens: int
    seconds: dict[str, list[float]]
    judgements: dict[str, Judgement]

    def rate(self, side: str) -> float:
        """New tokens a second, prompt included."""
        return self.new_tokens / median(self.seconds[side])

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.prompt.name, "dtype": self.dtype, "prompt_tokens": len(self.prompt.tokens),
            "new_tokens": self.new_tokens, "seconds": self.seconds,
            "tokens_per_second": {side: self.rate(side) for side in NAMES},
            "judgements": {side: j.as_json() for side, j in self.judgements.items()},
        }  # fmt: skip


def chosen(prompts: list[Prompt]) -> list[Prompt]:
    """At most ``FILES`` of the prompts, spread evenly."""
    return prompts[:: -(-len(prompts) // FILES)]


def measure(
    sides: ExpertSides, prompts: Iterable[Prompt], new_tokens: int, rounds: int, progress: Callable[[str], None]
) -> Iterable[ExpertRow]:
    """One row a prompt. Who goes first changes from round to round and from prompt to prompt."""
    dtype = str(sides.model.dtype).removeprefix("torch.")
    for number, prompt in enumerate(prompts):
        if number == 0:
            for side in NAMES:  # warm-up
                sides.run(side, prompt.tokens, 4)
        seconds: dict[str, list[float]] = {side: [] for side in NAMES}
        last: dict[str, Run] = {}
        for i in range(rounds):
            for side in NAMES if (number + i) % 2 == 0 else reversed(NAMES):
                progress(f"experts, {prompt.name}, {dtype}: {side}, round {i + 1} of {rounds}")
                last[side] = sides.run(side, prompt.tokens, new_tokens)
                seconds[side].append(last[side].seconds)
        progress(f"experts, {prompt.name}, {dtype}: judging against float64")
        judgements = {
            side: judge(sides.exact, prompt.tokens, last[EAGER], last[side], Errors.typical) for side in (HOOK, OURS)
        }
        yield ExpertRow(prompt, dtype, new_tokens, seconds, judgements)


def summary(rows: Sequence[ExpertRow]) -> dict[str, Any]:
    """Totals of all rows of one dtype: tokens a second, speed-ups over the library's loop, judgements."""
    new = sum(row.new_tokens for row in rows)
    rates = {side: new / sum(median(row.seconds[side]) for row in rows) for side in NAMES}
    kinds = {side: [row.judgements[side].kind for row in rows] for side in (HOOK, OURS)}
    return {
        "prompts": len(rows),
        "tokens_per_second": rates,
        "speedup": {side: rates[side] / rates[EAGER] for side in (HOOK, OURS)},
        "judgements": {side: {kind: found.count(kind) for kind in dict.fromkeys(found)}
                       for side, found in kinds.items()},
    }  # fmt: skip


def problems(rows: Sequence[ExpertRow]) -> list[str]:
    """What must not be. In short types one token in some dozens lies at the border of two experts and takes the other
    one, which no bound on rounding covers: there the library's own error at the median position is the measure, and
    few positions say nothing.
    """
    found = []
    for side in (HOOK, OURS):
        judgements = [row.judgements[side] for row in rows]
        wrong = sum(j.kind == "NO" for j in judgements)
        if wrong:
            found.append(f"experts, {rows[0].dtype}, {side}: {wrong} of {len(rows)} rows are NO")
        errors = [j.errors for j in judgements if j.errors]
        enough = sum(j.judged for j in judgements) >= POSITIONS
        if errors and enough and not Errors.together(errors).as_good_as_torch():
            found.append(f"experts, {rows[0].dtype}, {side}: logits further from float64's than the library's")
    return found
