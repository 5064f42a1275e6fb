"""Tuning a model to contexts longer than its own: interpolated positions, low-rank updates, attention in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ops
from effops.models import Llama
from effops.systems.passes import Attend, hidden_states
from effops.systems.shifted_attention import shifted_group_attention


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
    learning_rate: float,
    warm_up: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Trains the parameters that ask for gradients, in place: one step of AdamW on each of ``batches`` int64 [B,T],
    every layer attending by ``attend``. The losses, in nats a token."""
    trained = [p for p in model.parameters() if p.requires_grad]
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
    return losses


@torch.inference_mode()
def token_losses(model: Llama, tokens: Tensor) -> Tensor:
    """Nats of every token but the first, float32 [N, T - 1], with full attention."""
    rows = []
    for row in tokens.split(1):
        hidden = model.hidden_states(row)
        rows.append(F.cross_entropy(model.logits(hidden[0, :-1]).float(), row[0, 1:], reduction="none"))
    return torch.stack(rows)
