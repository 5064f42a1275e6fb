"""The demo's part on weights in few bits: bytes, speed and held-out loss of the shipped models in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.bench.demo.prompts import Prompt
from effops.decoding import generate
from effops.models import Llama, Mixtral, Tokenizer, load_model
from effops.models.shipped import heldout_files, model_dir, moe_dir
from effops.nn import quantize_
from effops.systems.texts import training_like

PLAIN = "float32"
# Formats of weights, activations float32: what quantize_ is told; None: how the parameters come.
FORMATS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "int8": {"format": "int8"},
    "fp8_e4m3": {"format": "fp8_e4m3"},
    "int4": {"format": "int4"},
    "int4, groups of 32": {"format": "int4", "group_size": 32},
    "int4, groups of 32, zeros": {"format": "int4", "group_size": 32, "symmetric": False},
    "int4, scaled": {"format": "int4", "calibration": True},
    "int4, groups of 32, zeros, scaled": {"format": "int4", "group_size": 32, "symmetric": False, "calibration": True},
}
MODELS: dict[str, Callable[[], Path]] = {"code-7m": model_dir, "code-moe-8m": moe_dir}
PROMPTS = 4
CALIBRATION = 8  # files of the standard library, none of them held out
FILES, TOKENS = 16, 768  # of each held-out file that has so many
LIMITS = {"int8": 0.01, "fp8_e4m3": 0.05, "int4": 0.25}  # nats above float32 that would be a fault


@dataclass(frozen=True)
class PackedRow:
    """``loss``: nats a token; ``above``: over float32's on the same files, with the standard error over files."""

    model: str
    format: str
    linear_bytes: int  # of what quantize_ replaces
    seconds: list[float]  # a token, one figure a run and prompt
    loss: float
    above: float
    deviation: float

    @property
    def rate(self) -> float:
        return 1 / median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.rate}


def measure(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], new_tokens: int, rounds: int, quick: bool,
    progress: Callable[[str], None],
) -> Iterable[PackedRow]:  # fmt: skip
    """A row for each model and format."""
    texts = _texts(tokenizer, 2 if quick else FILES, 64 if quick else TOKENS)
    others = training_like(tokenizer, 2 if quick else CALIBRATION, 64 if quick else TOKENS)
    for name, directory in MODELS.items():
        base: Tensor | None = None
        plain_bytes = 0
        for format, options in FORMATS.items():
            progress(f"weights in few bits, {name}: {format}")
            model = load_model(directory(), dtype=torch.float32)
            if options is not None and options.get("calibration"):
                if isinstance(model, Mixtral):
                    continue  # layers with experts are not scaled
                options = options | {"calibration": others}
            if options is None:
                plain_bytes = sum(
                    r.nbytes_before for r in quantize_(load_model(directory(), dtype=torch.float32), "int8")
                )
                if isinstance(model, Mixtral):
                    model.pack_experts_()
                nbytes = plain_bytes
            else:
                nbytes = sum(r.nbytes for r in quantize_(model, **options))
            seconds = [s for _ in range(rounds) for p in prompts for s in [_a_token(model, p.tokens, new_tokens)]]
            losses = _losses(model, texts)
            base = losses if base is None else base
            above = losses - base
            error = float(above.std() / len(above) ** 0.5)
            yield PackedRow(name, format, nbytes, seconds, float(losses.mean()), float(above.mean()), error)


def problems(rows: Sequence[PackedRow]) -> list[str]:
    """What must not be: losses that rounding the weights does not explain."""
    return [
        f"{row.model}, {row.format}: {row.above:.3f} nats above float32"
        for row in rows
        for format, limit in LIMITS.items()
        if row.format.split(",")[0] == format and not row.above <= limit + 3 * row.deviation
    ]


def _texts(tokenizer: Tokenizer, files: int, tokens: int) -> Tensor:
    """[files, tokens], evenly spread over those that are long enough."""
    all_ids = [tokenizer.encode(path.read_text(encoding="utf-8"))[:tokens] for path in heldout_files()]
    long = [ids for ids in all_ids if len(ids) == tokens]
    return torch.tensor(long[:: max(1, len(long) // files)][:files])


def _a_token(model: Llama, prompt: Sequence[int], count: int) -> float:
    """Seconds of a token after the prompt."""
    result = generate(model, [list(prompt)], max_new_tokens=count, ignore_eos=True)
    return result.stats.decode_seconds / (count - 1)


@torch.inference_mode()
def _losses(model: Llama, texts: Tensor) -> Tensor:
    """Of each text, nats a token."""
    rows = []
    for row in texts.split(1):
        logits = model(row)[0, :-1].float()
        rows.append(F.cross_entropy(logits, row[0, 1:]).double())
    return torch.stack(rows)
