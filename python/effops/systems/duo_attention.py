"""DuoAttention (arXiv 2410.10819): few KV heads retrieve from afar and keep every key, the others stream over the first
and the last tokens.

The heads are found by training a gate for each; measured against as many heads drawn at random and against those of
the smallest gates, on held-out text and on recall.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effops.cache import KVCache
from effops.models import Llama
from effops.systems import quality, texts
from effops.systems.induction import induction_model
from effops.systems.quality import Measured, NewCache
from effops.systems.report import Curves, Report, Table, Verdict
from effops.systems.retrieval_heads import RetrievalHeadFinder, choose_heads
from effops.systems.store import fingerprint, kept

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = (
    "half of the KV heads of a model with grouped queries can stream without loss; memory falls to 1/1.67, a decode "
    "step is up to 1.5 times as fast"
)
UNSEEN = (
    "speed, and memory at 100,000 tokens and more, where the streaming heads' share vanishes; whether the heads of a "
    "model that recalls from afar are found, beside that of the two-layer model made for it"
)
STEPS, LEARNING_RATE, PENALTY = 240, 0.02, 0.05
CONTEXTS = (256, 320, 384, 512, 640, 768)  # of training
PAIRS, WORDS = 3, 6  # passkeys of a context, words of a passkey
NUM_SINKS, RECENT = 16, 64
PROMPT, SCORED, BATCH = 1920, 48, 8
SPARSITIES = (0.25, 0.5, 0.75, 1.0)
SMALL = 0.05  # nats a token
VOCABULARY, RECALL_SAMPLES, RECALL_CONTEXT, RECALL_STEPS = 256, 16, 1000, 100

CHOICES = ("found", "at random", "smallest gates")


def heads_of(gates: Tensor, choice: str, sparsity: float) -> Tensor:
    """The full heads, bool ``[layers, G]``, as many by each choice."""
    if choice == "at random":
        gates = torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
    return choose_heads(-gates if choice == "smallest gates" else gates, sparsity)


def new_cache_of(model: Llama, full_heads: Tensor) -> NewCache:
    def new_cache(batch: int, capacity: int) -> KVCache:
        return model.new_streaming_cache(
            batch, capacity, window=RECENT, num_sinks=NUM_SINKS, full_heads=full_heads, step_tokens=1
        )

    return new_cache


def gates_of(run: Run) -> Tensor:
    """The model's gates: trained once on passkeys in training-like code, then read from the store."""
    contexts = sorted({min(c, run.model.config.context_length) for c in CONTEXTS})
    filler = texts.training_like(run.tokenizer, 8, contexts[-1])
    settings = {
        "model": fingerprint(run.model), "filler": filler.tolist(), "contexts": contexts, "steps": STEPS,
        "pairs": PAIRS, "words": WORDS,
        "learning_rate": LEARNING_RATE, "penalty": PENALTY, "sinks": NUM_SINKS, "recent": RECENT, "version": 1,
    }  # fmt: skip

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(STEPS):
            context = contexts[i % len(contexts)]
            yield texts.passkeys(run.tokenizer, filler[i % len(filler)], context, seed=i, pairs=PAIRS, words=WORDS)

    def make() -> dict[str, Tensor]:
        finder = RetrievalHeadFinder(run.model, num_sinks=NUM_SINKS, recent=RECENT)
        return {
            "gates": finder.train_gates(
                samples(), STEPS, learning_rate=LEARNING_RATE, penalty=PENALTY,
                progress=lambda done, total: run.progress("duo_attention: training gates", done, total),
            )
        }  # fmt: skip

    return kept("duo_attention", settings, make, again=run.retrain)["gates"]


def run(run: Run) -> Report:
    """Trains the gates, or reads them, and measures."""
    model = run.model
    gates = gates_of(run)
    prompt = min(PROMPT, model.config.context_length - SCORED - 1)
    losses = _losses(run, gates, prompt)
    full = losses["full cache"]
    above = {name: m.above(full) for name, m in losses.items()}
    recalled, found = _recall(run)
    verdict, seen = _judged(above, losses, prompt)
    exact = above[_ALL][0]
    problems = [] if abs(exact) < 1e-4 else [f"full heads alone are {exact:.2e} nats from the full cache"]
    ((layer, head),) = found.nonzero().tolist()
    right, level = recalled[layer, head] == 1, {"full cache": 0.0}
    points = {c: [(100 * s, above[_key(c, s)][0]) for s in SPARSITIES] for c in CHOICES}
    return Report(
        system="duo_attention",
        model=run.name,
        claim=CLAIM,
        tables=(
            _gates_table(gates),
            _loss_table(losses, above, prompt),
            Table(
                f"recall: {RECALL_SAMPLES} values asked for at the end of {RECALL_CONTEXT} tokens, a two-layer model "
                "with an induction head",
                ("the full head of four", "answers recalled"),
                [(f"layer {i}, head {g}" + ", found" * bool(found[i, g]), x) for (i, g), x in recalled.items()],
            ),
        ),
        curves=(Curves("held-out loss", "% of heads that stream", "nats a token above the full cache", points, level),),
        verdict=verdict,
        seen=f"{seen}; of the two-layer model's heads the one that retrieves is{'' if right else ' not'} found",
        unseen=UNSEEN,
        problems=problems,
    )  # fmt: skip


_ALL = "all heads full"


def _key(choice: str, sparsity: float) -> str:
    return f"{choice}, {sparsity}"


def _losses(run: Run, gates: Tensor, prompt: int) -> dict[str, Measured]:
    """The prompt is one chunk, which all heads see densely, as in the paper's prefill."""
    model = run.model
    caches: dict[str, NewCache] = {
        "full cache": model.new_cache, _ALL: new_cache_of(model, torch.ones_like(gates, dtype=torch.bool)),
    }  # fmt: skip
    for sparsity in SPARSITIES:
        for choice in CHOICES:
            caches[_key(choice, sparsity)] = new_cache_of(model, heads_of(gates, choice, sparsity))
    sample = texts.held_out(run.tokenizer, prompt + SCORED + 1)[: 2 * BATCH]

    def progress(name: str, done: int, total: int) -> None:
        run.progress(f"duo_attention: held-out loss, {name}", done, total)

    return quality.continuation_losses(model, caches, sample, prompt, batch=BATCH, progress=progress)


def _recall(run: Run) -> tuple[dict[tuple[int, int], float], Tensor]:
    """Of the two-layer model, whose gates are trained every time: accuracy with each of its KV heads as the only full
    one, and which one is found."""
    run.progress("duo_attention: recall")
    model = induction_model(VOCABULARY)
    task = texts.recall_of_tokens(VOCABULARY, RECALL_SAMPLES, 200, pairs=4, length=3)
    tokens = torch.cat([task.prompts, task.answers], 1)
    supervised = torch.zeros_like(tokens, dtype=torch.bool)
    supervised[:, task.prompts.shape[1] - 1 :] = True
    rows = range(len(tokens))
    samples = ((tokens[i : i + 1], supervised[i : i + 1]) for _ in range(RECALL_STEPS) for i in rows)
    finder = RetrievalHeadFinder(model, num_sinks=NUM_SINKS, recent=RECENT)
    gates = finder.train_gates(samples, RECALL_STEPS, learning_rate=0.05, penalty=PENALTY)
    task = texts.recall_of_tokens(VOCABULARY, RECALL_SAMPLES, RECALL_CONTEXT)
    accuracy = {}
    for i, g in torch.ones_like(gates).nonzero().tolist():
        only = torch.zeros_like(gates, dtype=torch.bool)
        only[i, g] = True
        accuracy[i, g] = quality.recall_accuracy(model, new_cache_of(model, only), task)
    return accuracy, choose_heads(gates, 0.75)


def _judged(above: dict[str, tuple[float, float]], losses: dict[str, Measured], prompt: int) -> tuple[Verdict, str]:
    """At half of the heads."""
    found, drawn, worst = (above[_key(choice, 0.5)][0] for choice in CHOICES)
    verdict: Verdict = "not seen"
    if found < min(drawn, worst):
        verdict = "seen" if found < SMALL else "partly seen"
    ratio = losses[_ALL].nbytes / losses[_key("found", 0.5)].nbytes
    return verdict, (
        f"where half of the heads stream after {prompt} tokens, loss changes by {found:+.3f} nats a token if the "
        f"gates choose, {drawn:+.3f} if chance does, {worst:+.3f} with the smallest gates' heads full (full cache: "
        f"{losses['full cache'].loss:.3f}; small is below {SMALL}); memory is 1/{ratio:.2f}"
    )


def _gates_table(gates: Tensor) -> Table:
    columns = ("layer", *(f"KV head {g}" for g in range(gates.shape[1])))
    return Table("gates", columns, [(str(i), *row) for i, row in enumerate(gates.tolist())])


def _loss_table(losses: dict[str, Measured], above: dict[str, tuple[float, float]], prompt: int) -> Table:
    full = losses["full cache"]
    rows: list[tuple[str | float | None, ...]] = [("all", 0, full.loss, None, None, full.nbytes / 1e6, full.step_ms)]
    for sparsity in SPARSITIES:
        for choice in CHOICES if sparsity < 1 else ("none",):
            name = _key("found" if choice == "none" else choice, sparsity)
            measured, (mean, error) = losses[name], above[name]
            rows.append(
                (choice, int(100 * sparsity), measured.loss, mean, error, measured.nbytes / 1e6, measured.step_ms)
            )
    return Table(
        f"held-out text, {len(full.losses)} files: {SCORED} tokens after {prompt}, one decode step each",
        ("full heads", "% stream", "nats", "above full", "±", "MB held", "ms"),
        rows,
        f"nats a token; ±: standard error of the difference over files; MB of {BATCH} sequences; ms: a step of them. "
        f"Streaming heads see {NUM_SINKS} first and {RECENT} last tokens; the prompt is one chunk, dense in all heads.",
    )
