"""What is asked of a device: requests with their lengths and times of arrival."""

from __future__ import annotations

import csv
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("workloads")
# The columns of public traces, the first that a file has.
ARRIVAL = ("arrival_s", "arrival", "arrived_at", "arrival_timestamp", "timestamp", "TIMESTAMP")
PROMPT = ("prompt_tokens", "prompt", "input_tokens", "input_toks", "ContextTokens", "num_prefill_tokens", "prompt_size")
OUTPUT = ("output_tokens", "output", "output_toks", "GeneratedTokens", "num_decode_tokens", "token_size")


@dataclass(frozen=True)
class Workload:
    """Requests: seconds of arrival, tokens of the prompt and of the answer, answer tokens there at the start."""

    arrival_s: Sequence[float]
    prompt: Sequence[int]
    output: Sequence[int]
    generated: Sequence[int]
    name: str = "workload"

    def __post_init__(self) -> None:
        n = len(self.prompt)
        for field in ("arrival_s", "output", "generated"):
            if len(getattr(self, field)) != n:
                raise ValueError(f"workload: {field}: expected {n} entries, got {len(getattr(self, field))}")
        for i in range(n):
            if self.prompt[i] < 1 or self.output[i] < 1 or not 0 <= self.generated[i] < self.output[i]:
                raise ValueError(
                    f"workload: request {i + 1}: expected a prompt and an output of 1 or more tokens and generated "
                    f"below output, got {self.prompt[i]}, {self.output[i]}, {self.generated[i]}"
                )
            if not self.arrival_s[i] >= 0:
                raise ValueError(f"workload: request {i + 1}: arrival: expected 0 or more, got {self.arrival_s[i]}")

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def fixed(cls, prompt: int, output: int, requests: int) -> Workload:
        """``requests`` equal ones, all there at the start."""
        return cls._of(lambda: (prompt, output), requests, f"{prompt}+{output}")

    @classmethod
    def gaussian(cls, prompt: int, output: int, requests: int, *, deviation: float = 0.1, seed: int = 0) -> Workload:
        """Lengths from normal laws with these means, ``deviation`` of the mean wide."""
        for name, mean in (("prompt", prompt), ("output", output)):
            if mean < 1:
                raise ValueError(f"workload: {name}: expected 1 or more tokens, got {mean}")
        draw = random.Random(seed)

        def one() -> tuple[int, int]:
            return tuple(max(1, round(draw.gauss(m, deviation * m))) for m in (prompt, output))  # type: ignore[return-value]

        return cls._of(one, requests, f"{prompt}+{output}")

    @classmethod
    def named(cls, name: str, requests: int, *, seed: int = 0) -> Workload:
        """Lengths from the quantiles of a data set: ``sharegpt`` or ``alpaca``, prompt and output independent."""
        return cls._of(Lengths.load(name).sampler(seed), requests, name)

    @classmethod
    def file(cls, path: str | Path) -> Workload:
        """A trace: CSV or TSV with a header, or JSON lines; columns as in Azure's, Splitwise's and Vidur's traces.

        Raises:
            ValueError: names the file and line, what was expected and what stands there.
        """
        path = Path(path)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".json"):
            rows: list[dict[str, Any]] = _json_rows(path, text)
        else:
            dialect = "excel-tab" if "\t" in text.partition("\n")[0] else "excel"
            rows = list(csv.DictReader(text.splitlines(), dialect=dialect))
        if not rows:
            raise ValueError(f"{path}: expected requests, got none")

        def column(names: Sequence[str], needed: bool) -> str | None:
            for name in names:
                if name in rows[0]:
                    return name
            if needed:
                raise ValueError(f"{path}: expected a column {' or '.join(names)}, got {', '.join(rows[0])}")
            return None

        for name in rows[0]:
            if name not in ARRIVAL and re.search("arriv|timestamp", str(name), re.IGNORECASE):
                raise ValueError(f"{path}: expected times in a column {' or '.join(ARRIVAL)}, got {name!r}")
        at, prompt, output = column(ARRIVAL, False), column(PROMPT, True), column(OUTPUT, True)
        assert prompt is not None and output is not None
        arrival, prompts, outputs = [], [], []
        for i, row in enumerate(rows):
            try:
                arrival.append(_seconds(row[at]) if at else 0.0)
                prompts.append(int(row[prompt]))
                outputs.append(int(row[output]))
            except (TypeError, ValueError, KeyError):
                raise ValueError(f"{path}: request {i + 1}: expected numbers, got {dict(row)}") from None
        first = min(arrival)
        return cls([a - first for a in arrival], prompts, outputs, [0] * len(rows), path.stem)

    @classmethod
    def _of(cls, one: Callable[[], tuple[int, int]], requests: int, name: str) -> Workload:
        pairs = [one() for _ in range(requests)]
        return cls([0.0] * requests, [p for p, _ in pairs], [o for _, o in pairs], [0] * requests, name)

    def poisson(self, per_second: float, *, seed: int = 0) -> Workload:
        """The same requests, arriving at random with this mean rate."""
        if not per_second > 0:
            raise ValueError(f"workload: per_second: expected above 0, got {per_second}")
        draw, now, arrival = random.Random(seed), 0.0, []
        for _ in range(len(self)):
            now += draw.expovariate(per_second)
            arrival.append(now)
        return Workload(arrival, self.prompt, self.output, self.generated, self.name)

    def warm(self, batch: int, *, seed: int = 0) -> Workload:
        """The first ``batch`` requests as a snapshot finds them: long answers more often, anywhere in their answer."""
        draw = random.Random(seed)
        chosen = draw.choices(range(len(self)), weights=list(self.output), k=batch)
        prompt = [self.prompt[i] for i in chosen] + list(self.prompt[batch:])
        output = [self.output[i] for i in chosen] + list(self.output[batch:])
        generated = [max(1, draw.randrange(o)) if o > 1 else 0 for o in output[:batch]]
        return Workload(
            [0.0] * batch + list(self.arrival_s[batch:]),
            prompt,
            output,
            generated + list(self.generated[batch:]),
            self.name,
        )


@dataclass(frozen=True)
class Lengths:
    """Laws of prompt and output lengths, as quantiles."""

    name: str
    quantile: Sequence[float]
    prompt: Sequence[float]
    output: Sequence[float]
    longest: int

    @classmethod
    def load(cls, name: str) -> Lengths:
        path = SHIPPED / f"{name}.json"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
            raise ValueError(f"workload: expected one of {names}, got {name!r}")
        raw = json.loads(path.read_text())
        return cls(name, raw["quantile"], raw["prompt"], raw["output"], raw["longest"])

    def sampler(self, seed: int) -> Callable[[], tuple[int, int]]:
        """Draws prompt and output, no request longer than the longest."""
        draw = random.Random(seed)

        def one(values: Sequence[float]) -> int:
            u = draw.random()
            i = min(bisect_right(self.quantile, u), len(self.quantile) - 1)
            a, b = self.quantile[i - 1], self.quantile[i]
            return max(1, round(values[i - 1] + (values[i] - values[i - 1]) * (u - a) / (b - a)))

        def pair() -> tuple[int, int]:
            prompt = min(one(self.prompt), self.longest - 1)
            return prompt, min(one(self.output), self.longest - prompt)

        return pair


def _seconds(value: object) -> float:
    """A number of seconds, or a time as ISO 8601 writes it, UTC where it names no zone."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        text = re.sub(r"(\.\d{6})\d+", r"\1", str(value)).replace("Z", "+00:00")
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    """An array of objects, or one a line."""
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected objects, got {next(r for r in rows if not isinstance(r, dict))!r}")
    return rows
