"""SinkLoRA (arXiv 2406.05678): a model is tuned to contexts longer than its own by attention inside groups of tokens,
fewer heads shifted than in LongLoRA and with sinks that every group sees, and decodes with H2O's cache.

Low-rank updates with interpolated positions, tuned with full attention, with SinkLoRA's and with LongLoRA's, compared
by the loss on held-out text; then what H2O's cache costs the model that was tuned as SinkLoRA says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effops.models import Llama
from effops.systems import quality, texts
from effops.systems.baselines import RecentKVCache
from effops.systems.context_tuning import Tuning, interpolated, token_losses, tune
from effops.systems.lora import add_lora_, merge_lora_
from effops.systems.quality import Measured, NewCache
from effops.systems.report import Curves, Report, Table, Verdict
from effops.systems.store import fingerprint, kept

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = (
    "tuning with SF-Attn reaches 92 % of what full attention gains in perplexity, LongLoRA's S²-Attn 39 %; H2O's cache "
    "then serves the long context"
)
UNSEEN = (
    "the paper's tuning (thousands of steps of models of 7B parameters) and contexts beyond those of training; SF-Attn "
    "is rebuilt from the paper's words, for its published code has LongLoRA's attention alone"
)
FACTOR, CONTEXT, GROUPS, NUM_SINKS = 4, 512, 4, 4
STEPS, WARM_UP, LEARNING_RATE, RANK, SEEDS = 120, 5, 2e-3, 8, 3
EVALUATED, STRETCH = 24, 64  # held-out files; tokens, in the curve by position
DECODED, SCORED = 8, 48  # files, and tokens of each that are decoded
SHARES = (16, 8, 4, 2)  # H2O keeps one in so many entries
SAME = 1e-3  # nats a token

TUNINGS = (
    Tuning("full attention", 0),
    Tuning("SF-Attn", 4, NUM_SINKS),
    Tuning("S²-Attn", 2, wraparound=True),
)


def run(run: Run) -> Report:
    """Tunes, or reads what was tuned, and measures."""
    if run.model.config.latent is not None or any(run.model.config.windows):
        raise ValueError(f"sinklora: model: expected layers that see every key, got others ({run.name})")
    context = min(CONTEXT, run.model.config.context_length) // (2 * GROUPS) * 2 * GROUPS
    short = context // FACTOR
    sample = texts.held_out(run.tokenizer, context)
    losses, decoder = _losses(run, sample[:EVALUATED], context)
    beyond = {name: [Measured(x[:, short - 1 :].mean(1).tolist()) for x in by_seed] for name, by_seed in losses.items()}
    verdict, seen = _judged(beyond)
    cached = _cached(run, decoder, sample[:DECODED])
    whole, _ = cached[f"h2o, {context}"].above(cached["full cache"])
    points = {}
    for name, by_seed in losses.items():
        mean = torch.stack(by_seed).mean((0, 1))
        points[name] = [(float(i * STRETCH), float(x.mean())) for i, x in enumerate(mean.split(STRETCH))]
    return Report(
        system="sinklora",
        model=run.name,
        claim=CLAIM,
        tables=(_tuning_table(losses, beyond, short, context), _cache_table(cached, context)),
        curves=(
            Curves("held-out loss by position", "position", "nats a token", points),
            Curves(
                "decoding with fewer entries", "entries of a KV head", "nats a token",
                {
                    label: [(context // share, cached[f"{kind}, {context // share}"].loss) for share in SHARES]
                    for kind, label in (("h2o", "H2O"), ("recent", "first 4 and last"))
                },
                {"full cache": cached["full cache"].loss},
            ),
        ),
        verdict=verdict,
        seen=f"{seen}; {_cache_sentence(cached, context)}",
        unseen=UNSEEN,
        problems=[f"H2O's cache that holds everything is {whole:+.4f} above the full one"] * (abs(whole) > SAME),
    )  # fmt: skip


def _losses(run: Run, sample: Tensor, context: int) -> tuple[dict[str, list[Tensor]], Llama]:
    """[N, T - 1] of the model as it is, interpolated, and tuned in each way, by seed; one that SF-Attn has tuned."""
    found = {"as it is": [token_losses(run.model, sample)]}
    found["interpolated"] = [token_losses(interpolated(run.model, FACTOR), sample)]
    for tuning in TUNINGS:
        found[tuning.name] = []
        for seed in range(SEEDS):
            model = _tuned(run, tuning, context, seed)
            run.progress(f"sinklora: held-out loss, {tuning.name}", seed, SEEDS)
            found[tuning.name].append(token_losses(model, sample))
            if tuning is TUNINGS[1]:
                decoder = model
    return found, decoder


def _tuned(run: Run, tuning: Tuning, context: int, seed: int) -> Llama:
    """What was trained is kept; the rest is the model's."""
    blocks = texts.training_like(run.tokenizer, STEPS, context)
    order = torch.randperm(STEPS, generator=torch.Generator().manual_seed(seed))
    settings = {
        "model": fingerprint(run.model), "tokens": blocks.tolist(), "tuning": vars(tuning), "factor": FACTOR,
        "groups": GROUPS, "warm_up": WARM_UP, "learning_rate": LEARNING_RATE, "rank": RANK, "seed": seed, "version": 2,
    }  # fmt: skip
    model = interpolated(run.model, FACTOR)
    add_lora_(model, RANK, seed=seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def make() -> dict[str, Tensor]:
        doing = f"sinklora: tuning with {tuning.name}, {seed + 1} of {SEEDS}"
        tune(model, blocks[order].split(1), tuning.attend(context // GROUPS), learning_rate=LEARNING_RATE,
             warm_up=WARM_UP, progress=lambda i: run.progress(doing, i, STEPS))  # fmt: skip
        return {name: p.detach().clone() for name, p in trained.items()}

    tensors = kept("sinklora", settings, make, again=run.retrain)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
    merge_lora_(model)
    return model


def _cached(run: Run, model: Llama, sample: Tensor) -> dict[str, Measured]:
    """Decoding over few entries: H2O's, half of them the last ones, and the first and last tokens alone. Both see the
    whole prompt while they read it."""
    context = sample.shape[1]
    prompt = context - 1 - SCORED

    def h2o(budget: int) -> NewCache:
        return lambda batch, capacity: model.new_heavy_hitter_cache(
            batch, capacity, budget=budget, recent=budget // 2, num_sinks=NUM_SINKS
        )

    def recent(budget: int) -> NewCache:
        return lambda batch, capacity: RecentKVCache.of(
            model, batch, capacity, budget=budget, num_sinks=NUM_SINKS, dense_layers=0
        )

    budgets = [context // share for share in SHARES]
    kinds: list[tuple[bool, dict[str, NewCache]]] = [
        (False, {"full cache": model.new_cache} | {f"recent, {b}": recent(b) for b in budgets}),
        (True, {f"h2o, {b}": h2o(b) for b in (*budgets, context)}),
    ]
    found: dict[str, Measured] = {}
    for own_prompt, caches in kinds:
        found |= quality.continuation_losses(
            model, caches, sample, prompt, own_prompt=own_prompt,
            progress=lambda name, done, total: run.progress(f"sinklora: decoding, {name}", done, total),
        )  # fmt: skip
    return found


def _judged(beyond: Mapping[str, list[Measured]]) -> tuple[Verdict, str]:
    """By the share of full attention's gain, if the two attentions in groups can be told apart at all."""
    (start,), (own,) = beyond["interpolated"], beyond["as it is"]
    full, sinks, shifted = (beyond[tuning.name] for tuning in TUNINGS)
    gain = start.loss - _mean(full)
    verdict: Verdict = "not seen"
    if gain > 0 and _apart(shifted, sinks) > 0:
        verdict = "seen" if start.loss - _mean(sinks) >= 0.9 * gain else "partly seen"
    told = []
    for name, worse, better in (
        ("SF-Attn above full attention", sinks, full),
        ("S²-Attn above SF-Attn", shifted, sinks),
    ):
        mean, error = _over_seeds(worse).above(_over_seeds(better))
        told.append(f"{name} {mean:+.4f} ± {error:.4f}" + " (not told apart)" * (_apart(worse, better) == 0))
    shares = ", ".join(f"{tuning.name} {start.loss - _mean(beyond[tuning.name]):.3f}" for tuning in TUNINGS)
    return verdict, (
        f"the interpolated model has {start.loss:.3f} nats a token (with its own positions {own.loss:.3f}), and tuning "
        f"takes off {shares}; " + ", ".join(told)
    )


def _mean(by_seed: list[Measured]) -> float:
    return _over_seeds(by_seed).loss


def _over_seeds(by_seed: list[Measured]) -> Measured:
    """Of every file the mean over seeds."""
    losses = [measured.losses for measured in by_seed]
    return Measured([sum(x) / len(x) for x in zip(*losses, strict=True)])


def _apart(worse: list[Measured], better: list[Measured]) -> int:
    """1 or -1 where the difference is beyond two standard errors and of one sign with every seed, else 0."""
    mean, error = _over_seeds(worse).above(_over_seeds(better))
    sign = 1 if mean > 0 else -1
    with_each = all(sign * (a.loss - b.loss) > 0 for a, b in zip(worse, better, strict=True))
    return sign if with_each and abs(mean) > 2 * error else 0


def _tuning_table(
    losses: Mapping[str, list[Tensor]], beyond: Mapping[str, list[Measured]], short: int, context: int
) -> Table:
    (start,) = beyond["interpolated"]
    gains = [start.loss - x.loss for x in beyond[TUNINGS[0].name]]
    rows: list[tuple[str | float | None, ...]] = []
    for name, by_seed in beyond.items():
        mean = _over_seeds(by_seed)
        within = float(torch.stack(losses[name])[..., : short - 1].mean())
        against = (None, None) if mean.losses == start.losses else mean.above(start)
        shares = sorted((start.loss - x.loss) / gain for x, gain in zip(by_seed, gains, strict=False) if gain > 0)
        tuned = name in {tuning.name for tuning in TUNINGS} and shares
        rows.append((name, within, mean.loss, *against, f"{shares[0]:.0%} to {shares[-1]:.0%}" if tuned else None))
    count = len(start.losses)
    return Table(
        f"held-out text, {count} files of {context} tokens, full attention",
        ("model", f"first {short}", "beyond", "change", "±", "of full's gain"),
        rows,
        f"nats a token, mean over {SEEDS} seeds; change: against interpolated, ±: its standard error over files; the "
        f"gain of full attention beyond {short}, by seed. "
        f"Positions at 1/{FACTOR} of their distance; {STEPS} steps of {context}, groups of {context // GROUPS}.",
    )


def _cache_table(cached: Mapping[str, Measured], context: int) -> Table:
    full = cached["full cache"]
    rows: list[tuple[str | float | None, ...]] = [("full cache", context, full.loss, None, None, full.nbytes / 1e6)]
    for kind, label in (("h2o", "H2O"), ("recent", f"first {NUM_SINKS} and last")):
        for budget in (context // share for share in SHARES):
            measured = cached[f"{kind}, {budget}"]
            held = measured.nbytes / 1e6 if kind == "h2o" else None
            rows.append((label, budget, measured.loss, *measured.above(full), held))
    return Table(
        f"the model tuned with {TUNINGS[1].name} decodes {SCORED} tokens after {context - 1 - SCORED}",
        ("cache", "entries", "nats", "above full", "±", "MB"),
        rows,
        f"nats a token, {len(full.losses)} held-out files; MB: memory of so many sequences. The first and last tokens "
        "are read from a full cache.",
    )


def _cache_sentence(cached: Mapping[str, Measured], context: int) -> str:
    parts = []
    for share in (SHARES[0], SHARES[-2]):
        entries, full = context // share, cached["full cache"]
        (h2o, error), (recent, _) = (cached[f"{kind}, {entries}"].above(full) for kind in ("h2o", "recent"))
        parts.append(f"with {entries} entries {h2o:+.3f} ± {error:.3f} (first and last tokens {recent:+.3f})")
    return "H2O's cache costs the tuned model " + ", ".join(parts)
