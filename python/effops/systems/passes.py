"""Passes over whole sequences in which every layer attends as it is told, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.cache import Step
from effops.models import Llama
from effops.nn import Rope, functional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q [B,T,H,D], k [B,T,G,D], v [B,T,G,Dv], queries and keys rotated, to [B,T,H,Dv]."""


class _Layer:
    """A layer's "cache" of one pass: it keeps nothing between passes."""

    needs_queries = False

    def __init__(self, heads: int, attend: Attend) -> None:
        self._heads, self._attend = heads, attend

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        self._keys = k, v

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        kv_heads = (qkv.shape[2] - self._heads) // 2
        q, k, v = qkv.split((self._heads, kv_heads, kv_heads), 2)
        self.append(functional.rotary(k, cos, sin, step.positions), v, step)
        return functional.rotary(q, cos, sin, step.positions)

    def attend(self, q: Tensor, step: Step, **options: Any) -> Tensor:
        return self._attend(q, *self._keys)


def hidden_states(model: Llama, tokens: Tensor, attends: Sequence[Attend]) -> Tensor:
    """The final hidden states [B,T,d], normed, of tokens int64 [B,T]; layer i attends by ``attends[i]``, whatever
    window its configuration names. Of models with ordinary attention."""
    batch, count = tokens.shape
    positions = torch.arange(count, dtype=torch.int32, device=tokens.device).expand(batch, -1)
    rope = Rope(*model.rotary.tables(count, tokens.device), positions)
    lens = torch.full((batch,), count, dtype=torch.int32, device=tokens.device)
    step = Step(positions, positions, lens, [count] * batch, count, count)
    x: Tensor = model.embed_tokens(tokens)
    for layer, attend in zip(model.layers, attends, strict=True):
        x = layer(x, rope, _Layer(model.config.num_attention_heads, attend), step)
    normed: Tensor = model.norm(x)
    return normed
