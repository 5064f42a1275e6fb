"""Double Sparsity (arXiv 2408.07092): a few channels of every key, chosen beforehand, find the tokens that a decode
step attends to.

Measured on held-out text and on recall: by how many tokens and channels, by calibrated channels against random ones,
against a step that sees the same number of first and last tokens, and against Quest's pages (arXiv 2406.10774).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effops.cache import KVCache, LabelChannels, calibrate_channels
from effops.models import Llama
from effops.systems import quality, texts
from effops.systems.baselines import RecentKVCache
from effops.systems.cost import bytes_read
from effops.systems.induction import induction_model
from effops.systems.quality import Measured, NewCache
from effops.systems.report import Curves, Report, Table, Verdict
from effops.systems.store import fingerprint, kept

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = (
    "a sixteenth of the tokens, found by a sixteenth of the channels (4 bits each), loses little quality; attention "
    "is up to 14.1 times as fast, generation 1.9 times"
)
UNSEEN = (
    "speed: at 2,000 tokens the keys and values of so small a model lie in the processor's cache (`effops bench "
    "sparse` measures the step at 32,000 and more); the paper's heads have 128 channels, a sixteenth of which is 8, "
    "and its models find what stands far back, which a 7M model trained for two hours hardly does; offloading"
)
PROMPT, SCORED, BATCH = 1920, 48, 8
BLOCKS, BLOCK = 16, 512  # of calibration
BITS = 4
SMALL = 0.05  # nats a token
ABLE = 0.6  # recall of the full cache from which on a model is measured itself
OWN_SAMPLES, OWN_CONTEXT = 16, 256  # whether it is
VOCABULARY, RECALL_SAMPLES, RECALL_CONTEXT = 256, 32, 2000


@dataclass(frozen=True)
class Variant:
    """How a step finds its tokens. ``share``: one in so many channels; 0: no labels, the first and last tokens, or
    where there is a ``page``, pages of so many tokens by their bounds."""

    name: str
    share: int
    random: bool = False
    page: int = 0


VARIANTS = (
    Variant("D/16 channels", 16),
    Variant("D/8 channels", 8),
    Variant("D/4 channels", 4),
    Variant("D/4 random ones", 4, random=True),
    Variant("first and last", 0),
    Variant("pages of 8", 0, page=8),
)
PAGED_WINDOW = 9  # last tokens that are always seen: with the first 4 they touch three pages, no more than 24 tokens


def channels_of(run: Run) -> LabelChannels:
    """The model's channels: calibrated once on blocks of training-like text, then read from the store."""
    blocks = min(BLOCK, run.model.config.context_length)
    tokens = texts.training_like(run.tokenizer, BLOCKS, blocks)
    settings = {"model": fingerprint(run.model), "tokens": tokens.tolist(), "statistic": "qk", "version": 1}

    def make() -> dict[str, Tensor]:
        run.progress("double_sparsity: calibrating channels")
        return vars(calibrate_channels(run.model, tokens.split(4)))

    return LabelChannels(**kept("double_sparsity", settings, make, again=run.retrain))


def randomised(channels: LabelChannels, seed: int = 0) -> LabelChannels:
    """The same ranges with the channels of every head in random order."""
    drawn = torch.rand(channels.order.shape, generator=torch.Generator().manual_seed(seed))
    return replace(channels, order=drawn.argsort(-1).int())


def new_cache_of(
    model: Llama, channels: LabelChannels, variant: Variant, budget: int, dense_layers: int = 2
) -> NewCache:
    def new_cache(batch: int, capacity: int) -> KVCache:
        if variant.page:
            return model.new_quest_cache(
                batch, capacity, budget=budget - budget % variant.page, page=variant.page, window=PAGED_WINDOW,
                dense_layers=dense_layers,
            )  # fmt: skip
        if not variant.share:
            return RecentKVCache.of(model, batch, capacity, budget=budget, dense_layers=dense_layers)
        chosen = randomised(channels) if variant.random else channels
        return model.new_labelled_cache(
            batch, capacity, channels=chosen, budget=budget, num_channels=channel_count(model, variant), bits=BITS,
            dense_layers=dense_layers,
        )  # fmt: skip

    return new_cache


def channel_count(model: Llama, variant: Variant) -> int:
    return max(1, model.config.head_dim // variant.share) if variant.share else 0


def label_bits(model: Llama, variant: Variant) -> int:
    """What a step reads to find its tokens, a token and KV head."""
    if variant.page:
        return 2 * model.config.head_dim * model.dtype.itemsize * 8 // variant.page
    return channel_count(model, variant) * BITS


def budgets_of(context: int) -> list[int]:
    """A 32nd, a 16th and an 8th of the context; at least what the first and the last tokens of a list take."""
    return sorted({max(24, context // share) for share in (32, 16, 8)})


def run(run: Run) -> Report:
    """Calibrates, or reads what was, and measures."""
    model = run.model
    if model.config.latent is not None:
        raise ValueError(f"double_sparsity: model: expected ordinary attention, got latent attention ({run.name})")
    channels = channels_of(run)
    prompt = min(PROMPT, model.config.context_length - SCORED - 1)
    budgets = budgets_of(prompt)
    losses = _losses(run, channels, prompt, budgets)
    full = losses["full cache"]
    own = texts.recall_in_code(run.tokenizer, OWN_SAMPLES, min(OWN_CONTEXT, model.config.context_length - 4))
    able = quality.recall_accuracy(model, model.new_cache, own, batch=BATCH)
    recalled, recall_full = _recall(run, able, channels)

    above = {name: m.above(full) for name, m in losses.items()}
    headline = {v.name: above[_key(v, budgets[len(budgets) // 2])] for v in VARIANTS}
    verdict, seen = _judged(headline, full, budgets[len(budgets) // 2], prompt)
    exact = above[_ALL][0]
    problems = [] if abs(exact) < 1e-4 else [f"a budget of all tokens is {exact:.2e} nats from the full cache"]
    return Report(
        system="double_sparsity",
        model=run.name,
        claim=CLAIM,
        tables=(
            _loss_table(model, losses, above, prompt, budgets),
            _recall_table(recalled, recall_full, able, able >= ABLE, run.name),
        ),
        curves=(
            Curves("held-out loss", "tokens that a step attends to", "nats a token above the full cache",
                   {v.name: [(b, above[_key(v, b)][0]) for b in budgets] for v in VARIANTS}, {"full cache": 0.0}),
            Curves("recall", "tokens that a step attends to", "answers recalled",
                   {v.name: sorted(recalled[v.name].items()) for v in VARIANTS}, {"full cache": recall_full}),
        ),
        verdict=verdict,
        seen=seen,
        unseen=UNSEEN,
        problems=problems,
    )  # fmt: skip


_ALL = "D/16 channels, all tokens"


def _key(variant: Variant, budget: int) -> str:
    return f"{variant.name}, {budget}"


def _losses(run: Run, channels: LabelChannels, prompt: int, budgets: list[int]) -> dict[str, Measured]:
    model, length = run.model, prompt + SCORED + 1
    caches: dict[str, NewCache] = {
        "full cache": model.new_cache,
        _ALL: new_cache_of(model, channels, VARIANTS[0], length),
    }
    for variant in VARIANTS:
        caches |= {_key(variant, b): new_cache_of(model, channels, variant, b) for b in budgets}
    sample = texts.held_out(run.tokenizer, length)[: 2 * BATCH]

    def progress(name: str, done: int, total: int) -> None:
        run.progress(f"double_sparsity: held-out loss, {name}", done, total)

    return quality.continuation_losses(model, caches, sample, prompt, batch=BATCH, progress=progress)


def _recall(run: Run, able: float, channels: LabelChannels) -> tuple[dict[str, dict[int, float]], float]:
    """Accuracy by variant and budget, and the full cache's; of the model itself if it can recall, else of the one that
    is made for it."""
    if able >= ABLE:
        model, dense_layers = run.model, 2
        context = min(RECALL_CONTEXT, model.config.context_length - 4)
        task = texts.recall_in_code(run.tokenizer, RECALL_SAMPLES, context)
    else:
        model, dense_layers = induction_model(VOCABULARY), 0
        task = texts.recall_of_tokens(VOCABULARY, RECALL_SAMPLES, RECALL_CONTEXT)
        noise = torch.randint(0, VOCABULARY, (2, BLOCK), generator=torch.Generator().manual_seed(1))
        channels = calibrate_channels(model, [noise])
    budgets = budgets_of(task.prompts.shape[1])
    found: dict[str, dict[int, float]] = {}
    for i, variant in enumerate(VARIANTS):
        run.progress(f"double_sparsity: recall, {variant.name}", i, len(VARIANTS))
        found[variant.name] = {
            b: quality.recall_accuracy(model, new_cache_of(model, channels, variant, b, dense_layers), task)
            for b in budgets
        }
    return found, quality.recall_accuracy(model, model.new_cache, task)


def _judged(headline: dict[str, tuple[float, float]], full: Measured, budget: int, prompt: int) -> tuple[Verdict, str]:
    """By what each variant loses at the middle budget."""
    few, more, drawn, recent = (headline[VARIANTS[i].name][0] for i in (0, 2, 3, 4))
    verdict: Verdict = "not seen"
    if few < SMALL and few < recent:
        verdict = "seen"
    elif more < SMALL and more < min(drawn, recent):
        verdict = "partly seen"
    return verdict, (
        f"where a step attends to {budget} tokens after {prompt}, loss changes by {few:+.3f} nats a token with a "
        f"sixteenth of the channels, {more:+.3f} with a quarter, {drawn:+.3f} with as many random ones, {recent:+.3f} "
        f"with the first and last tokens (full cache: {full.loss:.3f}; small is below {SMALL})"
    )


def _loss_table(
    model: Llama, losses: dict[str, Measured], above: dict[str, tuple[float, float]], prompt: int, budgets: list[int]
) -> Table:
    length, full = prompt + SCORED // 2, losses["full cache"]
    rows: list[tuple[str | float | None, ...]] = [
        ("full cache", None, full.loss, None, None, bytes_read(model, length) / 1e6, full.step_ms)
    ]
    for variant in VARIANTS:
        for budget in budgets:
            measured, (mean, error) = losses[_key(variant, budget)], above[_key(variant, budget)]
            tokens = budget - budget % max(1, variant.page)
            read = bytes_read(model, length, budget=tokens, label_bits=label_bits(model, variant))
            rows.append((variant.name, budget, measured.loss, mean, error, read / 1e6, measured.step_ms))
    return Table(
        f"held-out text, {len(full.losses)} files: {SCORED} tokens after {prompt}, one decode step each",
        ("found by", "tokens", "nats", "above full", "±", "MB read", "ms"),
        rows,
        "nats a token; ±: standard error of the difference over files; MB: keys, values and labels or bounds of a step "
        f"of one sequence; ms: a step of {BATCH}. The first two layers see every key in all rows; pages are whole ones "
        "within so many tokens.",
    )


def _recall_table(recalled: dict[str, dict[int, float]], full: float, able: float, itself: bool, name: str) -> Table:
    rows: list[tuple[str | float | None, ...]] = [("full cache", None, full)]
    rows += [(variant, budget, x) for variant, points in recalled.items() for budget, x in points.items()]
    who = name if itself else "a two-layer model with an induction head"
    why = (
        ""
        if itself
        else ": too few to measure caches by, so that a model whose weights are written down takes its place"
    )
    return Table(
        f"recall: {RECALL_SAMPLES} values asked for at the end of {RECALL_CONTEXT} tokens, {who}",
        ("found by", "tokens", "answers recalled"),
        rows,
        f"{name} itself recalls {able:.0%} of numbers assigned within {OWN_CONTEXT} tokens of code with its full "
        f"cache{why}.",
    )
