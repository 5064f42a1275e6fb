"""SinkLoRA (arXiv 2406.05678): a model is tuned to contexts longer than its own by attention inside groups of tokens,
fewer heads shifted than in LongLoRA and with sinks that every group sees; used with full attention.

Low-rank updates with interpolated positions, tuned with full attention, with SinkLoRA's and with LongLoRA's, compared
by the loss on held-out text beyond the trained context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ops
from effops.models import Llama
from effops.systems import texts
from effops.systems.lora import add_lora_, merge_lora_
from effops.systems.passes import Attend, hidden_states
from effops.systems.quality import Measured
from effops.systems.report import Curves, Report, Table, Verdict
from effops.systems.shifted_attention import shifted_group_attention
from effops.systems.store import fingerprint, kept

if TYPE_CHECKING:
    from effops.systems.runner import Run

CLAIM = "tuning with SF-Attn reaches 92 % of what full attention gains in perplexity, LongLoRA's S²-Attn 39 %"
UNSEEN = (
    "the paper's tuning (thousands of steps of models of 7B parameters); its cache for inference, which is another "
    "system's; SF-Attn is rebuilt from the paper's words, for its published code has LongLoRA's attention alone"
)
FACTOR, CONTEXT, GROUPS, NUM_SINKS = 2, 4096, 4, 4
STEPS, WARM_UP, LEARNING_RATE, RANK = 10, 2, 1e-3, 8
EVALUATED = 4  # held-out files
STRETCH = 512  # tokens, in the curve by position


@dataclass(frozen=True)
class Tuning:
    """How layers attend while they are tuned. ``shifted``: one in so many heads; 0: full attention."""

    name: str
    shifted: int
    num_sinks: int = 0
    wraparound: bool = False

    def attend(self, group_size: int) -> Attend:
        def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, causal=True)

        def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return shifted_group_attention(
                q, k, v, group_size, shift_heads=q.shape[2] // self.shifted, num_sinks=self.num_sinks,
                wraparound=self.wraparound,
            )  # fmt: skip

        return grouped if self.shifted else full


TUNINGS = (
    Tuning("full attention", 0),
    Tuning("SF-Attn", 4, NUM_SINKS),
    Tuning("S²-Attn", 2, wraparound=True),
)


def interpolated(model: Llama, factor: float) -> Llama:
    """A copy whose positions are ``1 / factor`` as far apart, so that as many times the context fits between those it
    was trained with (position interpolation, arXiv 2306.15595).

    Raises:
        ValueError: the model's positions are scaled already.
    """
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"interpolated: model: expected plain rotary positions, got rope_type {rope['rope_type']!r}")
    config = replace(
        model.config,
        max_position_embeddings=int(model.config.max_position_embeddings * factor),
        rope_parameters={**rope, "rope_type": "linear", "factor": float(factor)},
    )
    longer = type(model)(config, dtype=model.dtype, device=model.device)
    longer.load_state_dict(model.state_dict())
    return longer.eval()


def tune(
    model: Llama,
    batches: Iterable[Tensor],
    attend: Attend,
    *,
    learning_rate: float = LEARNING_RATE,
    warm_up: int = WARM_UP,
    rank: int = RANK,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Tunes the model in place, one step of AdamW on each of ``batches`` int64 [B,T], every layer attending by
    ``attend``: low-rank updates, merged at the end, embedding and norms. The losses, in nats a token."""
    trained = add_lora_(model, rank)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / (warm_up + 1)))
    losses = []
    for i, tokens in enumerate(batches):
        progress(i)
        optimizer.zero_grad()
        hidden = hidden_states(model, tokens, [attend] * len(model.layers))
        logits = model.logits(hidden[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    merge_lora_(model)
    return losses


@torch.inference_mode()
def token_losses(model: Llama, tokens: Tensor) -> Tensor:
    """Nats of every token but the first, float32 [N, T - 1], with full attention."""
    rows = []
    for row in tokens.split(1):
        hidden = model.hidden_states(row)
        rows.append(F.cross_entropy(model.logits(hidden[0, :-1]).float(), row[0, 1:], reduction="none"))
    return torch.stack(rows)


def run(run: Run) -> Report:
    """Tunes, or reads what was tuned, and measures."""
    if run.model.config.latent is not None or any(run.model.config.windows):
        raise ValueError(f"sinklora: model: expected layers that see every key, got others ({run.name})")
    trained = run.model.config.context_length
    context = min(CONTEXT, FACTOR * trained) // (2 * GROUPS) * 2 * GROUPS
    sample = texts.held_out(run.tokenizer, context)[:EVALUATED]
    models: dict[str, Callable[[], Llama]] = {
        "as it is": lambda: run.model,
        "interpolated": lambda: interpolated(run.model, FACTOR),
    }
    for tuning in TUNINGS:
        models[tuning.name] = lambda t=tuning: _tuned(run, t, context)  # type: ignore[misc]
    losses = {}
    for i, (name, make) in enumerate(models.items()):
        model = make()
        run.progress(f"sinklora: held-out loss, {name}", i, len(models))
        losses[name] = token_losses(model, sample)
    beyond = {name: Measured(x[:, trained - 1 :].mean(1).tolist()) for name, x in losses.items()}
    verdict, seen = _judged(beyond)
    start = beyond["interpolated"]
    rows: list[tuple[str | float | None, ...]] = []
    for name, measured in beyond.items():
        within = float(losses[name][:, : trained - 1].mean())
        rows.append((name, within, measured.loss, *((None, None) if measured is start else measured.above(start))))
    points = {
        name: [(float(at), float(x[:, at : at + STRETCH].mean())) for at in range(0, context - 1, STRETCH)]
        for name, x in losses.items()
    }
    return Report(
        system="sinklora",
        model=run.name,
        claim=CLAIM,
        tables=(
            Table(
                f"held-out text, {len(sample)} files of {context} tokens, full attention",
                ("model", f"first {trained}", "beyond", "against interpolated", "±"),
                rows,
                f"nats a token; ±: standard error of the difference over files. Tuned in {STEPS} steps of {context}.",
            ),
        ),
        curves=(Curves("held-out loss by position", "position", "nats a token", points),),
        verdict=verdict,
        seen=seen,
        unseen=UNSEEN,
    )


def _tuned(run: Run, tuning: Tuning, context: int) -> Llama:
    tokens = texts.training_like(run.tokenizer, STEPS, context)
    settings = {
        "model": fingerprint(run.model), "tokens": tokens.tolist(), "tuning": vars(tuning), "factor": FACTOR,
        "groups": GROUPS, "warm_up": WARM_UP, "learning_rate": LEARNING_RATE, "rank": RANK, "version": 1,
    }  # fmt: skip
    model = interpolated(run.model, FACTOR)

    def make() -> dict[str, Tensor]:
        tune(model, tokens.split(1), tuning.attend(context // GROUPS),
             progress=lambda i: run.progress(f"sinklora: tuning with {tuning.name}", i, STEPS))  # fmt: skip
        return {name: x.clone() for name, x in model.state_dict().items()}

    model.load_state_dict(kept("sinklora", settings, make, again=run.retrain))
    return model


def _judged(beyond: dict[str, Measured]) -> tuple[Verdict, str]:
    """By the share of full attention's gain."""
    start = beyond["interpolated"].loss
    gains = {tuning.name: start - beyond[tuning.name].loss for tuning in TUNINGS}
    full, sinks, shifted = gains.values()
    verdict: Verdict = "not seen"
    if full > 0 and sinks > shifted:
        verdict = "seen" if sinks >= 0.9 * full else "partly seen"
    shares = ", ".join(f"{name} {gain:.3f}" + f" ({gain / full:.0%})" * (full > 0) for name, gain in gains.items())
    return verdict, (
        f"beyond the trained context the interpolated model has {start:.3f} nats a token (with its own positions "
        f"{beyond['as it is'].loss:.3f}), and tuning takes off {shares}"
    )
