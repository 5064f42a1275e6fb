"""What layers share whose decode steps attend to few tokens of a dense cache, chosen query by query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.dense import RotatingLayer


class SelectingLayer(RotatingLayer, ABC):
    """Keys and values of one layer, of which a decode step attends to up to ``budget`` tokens a list (0: to all), the
    first ``num_sinks`` and the last ``window`` among them; ``_select`` names them.

    Prompts, trees, windows of the layer's own and sequences within the budget see every key.
    """

    __slots__ = ("budget", "num_sinks", "window")

    def __init__(self, k: Tensor, v: Tensor, budget: int, num_sinks: int, window: int) -> None:
        super().__init__(k, v)
        self.budget, self.num_sinks, self.window = budget, num_sinks, window

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        chooses = step.slots.shape[1] == 1 and step.tree is None and not options.get("window")
        if not chooses or not 0 < self.budget < step.max_kv_len:
            return super().attend(q, step, causal=causal, **options)
        options.pop("window", None)
        return self._attend_listed(q, self._select(q, step), step, **options)

    @abstractmethod
    def _select(self, q: Tensor, step: Step) -> Tensor:
        """int32 [B,G,S], what ``ops.sparse_attention`` takes."""

    def _attend_listed(self, q: Tensor, indices: Tensor, step: Step, **options: Any) -> Tensor:
        out = ops.sparse_attention(q, self.k, self.v, indices, kv_lens=step.kv_lens, **options)
        assert isinstance(out, Tensor)
        return out
