"""What computing at memory banks does to a model's predictions: the loss of held-out text."""

from __future__ import annotations

import copy

from effops.cache import KVCache
from effops.models import Llama
from effops.pim import BankedKVCache, offload
from effops.systems import quality, texts
from effops.systems.quality import Measured, NewCache
from effops.systems.report import Table
from effops.systems.runner import Run

TEXTS, PROMPT, SCORED, BATCH = 16, 256, 32, 8


def measured(run: Run, device: str) -> dict[str, Measured]:
    """Losses of the same texts: as the model is, its layers at the units, its attention, both."""
    sample = texts.held_out(run.tokenizer, PROMPT + SCORED + 1)[:TEXTS]
    moved = offload(copy.deepcopy(run.model), device, rows=BATCH)
    found: dict[str, Measured] = {}
    for name, model in (("plain", run.model), ("layers at the units", moved)):
        caches: dict[str, NewCache] = {name: model.new_cache}
        if model is run.model:
            caches["attention at the units"] = _banked(model, device)
        else:
            caches["both"] = _banked(model, device)

        def progress(cache: str, done: int, total: int) -> None:
            run.progress(f"{device}: loss of held-out text, {cache}", done, total)

        found |= quality.continuation_losses(model, caches, sample, PROMPT, batch=BATCH, progress=progress)
    return found


def _banked(model: Llama, device: str) -> NewCache:
    config = model.config

    def new_cache(batch: int, capacity: int) -> KVCache:
        return BankedKVCache(
            device, config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim,
            dtype=model.dtype,
        )  # fmt: skip

    return new_cache


def table(run: Run, device: str) -> Table:
    found = measured(run, device)
    plain = found["plain"]
    rows: list[tuple[str | float | None, ...]] = []
    for name, m in found.items():
        above, error = (None, None) if m is plain else m.above(plain)
        rows.append((name, m.loss, above, error))
    return Table(
        f"predictions with values and sums as {device} has them: {run.name}",
        ("", "nats a token", "above plain", "+-"), rows,
        f"{len(plain.losses)} held-out texts, {SCORED} decode steps after {PROMPT} tokens; plain: "
        f"{str(run.model.dtype)[6:]}; banks hold 16-bit values",
    )  # fmt: skip
