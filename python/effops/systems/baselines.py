"""The simplest cache of a budget: a decode step sees the first and the last tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effops.cache import DenseKVCache, DenseLayer, Step
from effops.models import Llama


class _RecentLayer(DenseLayer):
    __slots__ = ("num_sinks", "recent")

    def __init__(self, layer: DenseLayer, num_sinks: int, recent: int) -> None:
        super().__init__(layer.k, layer.v)
        self.num_sinks, self.recent = num_sinks, recent

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        if step.slots.shape[1] == 1 and step.tree is None and not options.get("window"):
            options |= {"window": self.recent, "num_sinks": self.num_sinks}
        return super().attend(q, step, causal=causal, **options)


class RecentKVCache(DenseKVCache):
    """A dense cache whose decode steps see ``num_sinks`` first and ``budget - num_sinks`` last tokens, the new one
    among them. Prompts and trees, layers with a window of their own and the first ``dense_layers`` layers see
    every key."""

    @classmethod
    def of(
        cls, model: Llama, batch_size: int, capacity: int, *, budget: int, num_sinks: int = 4, dense_layers: int = 2
    ) -> RecentKVCache:
        """An empty one that fits the model."""
        if not 0 <= num_sinks < budget:
            raise ValueError(f"RecentKVCache: budget: expected more than num_sinks = {num_sinks}, got {budget}")
        c = model.config
        cache = cls(
            c.num_hidden_layers, batch_size, capacity, c.num_key_value_heads, c.head_dim, v_head_dim=c.v_head_dim,
            dtype=model.dtype, device=model.device,
        )  # fmt: skip
        cache.layers[dense_layers:] = [
            _RecentLayer(layer, num_sinks, budget - num_sinks) for layer in cache.layers[dense_layers:]
        ]
        return cache
