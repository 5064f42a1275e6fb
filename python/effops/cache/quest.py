"""The KV cache of Quest: beside every page of keys the least and the largest of each channel, by which a decode step
finds the pages that it attends to (arXiv 2406.10774)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.dense import DenseKVCache
from effops.cache.memory import cache_memory
from effops.cache.selecting import SelectingLayer


class QuestLayer(SelectingLayer):
    """Keys, values and bounds of one layer. ``low`` and ``high`` [B,P,G,D], the bounds of ``page`` tokens each; memory
    [B,G,P,D]."""

    __slots__ = ("high", "low", "page")

    def __init__(
        self, k: Tensor, v: Tensor, low: Tensor, high: Tensor, page: int, budget: int, num_sinks: int, window: int
    ) -> None:
        super().__init__(k, v, budget, num_sinks, window)
        self.low, self.high, self.page = low, high, page

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        super().append(k, v, step)
        ops.append_page_bounds(self.low, self.high, k, step.slots, self.page)

    def _select(self, q: Tensor, step: Step) -> Tensor:
        return ops.page_topk(
            q, self.low, self.high, self.budget // self.page, self.page, kv_lens=step.kv_lens,
            num_sinks=self.num_sinks, window=self.window,
        )  # fmt: skip


class QuestKVCache(DenseKVCache):
    """A dense cache whose decode steps attend to ``budget // page`` pages a KV head: those of the first ``num_sinks``
    and the last ``window`` tokens, and those that the bounds of their keys say may matter most.

    A page is ``page`` neighbouring tokens of a sequence. Prompts, trees, layers with a window of their own and the
    first ``dense_layers`` layers see every key, and so do all until a sequence is longer than the budget. Bounds take
    as many bytes as the keys of two tokens a page; nothing is evicted, so that any page may be chosen again. Tokens
    that were rolled back, or not accepted, may leave the bounds of their page wider than its keys until the page
    begins anew, never narrower.

    Raises:
        ValueError: a budget that is no multiple of the page, or has not the pages that ``num_sinks`` and ``window``
            may touch.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        budget: int,
        page: int = 16,
        num_sinks: int = 4,
        window: int = 16,
        dense_layers: int = 2,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if page < 1:
            raise self._error("page", "1 or more tokens", page)
        if num_sinks < 0 or window < 1:
            raise self._error("window", "1 or more, and num_sinks 0 or more", f"{window} and {num_sinks}")
        least = page * (-(-num_sinks // page) + -(-(window - 1) // page) + 1)
        if budget < least or budget % page != 0:
            raise self._error("budget", f"a multiple of page = {page} tokens, {least} or more", budget)
        super().__init__(
            num_layers, batch_size, capacity, num_kv_heads, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device
        )
        self.page = page
        with torch.inference_mode(False):
            self._bounds = cache_memory(
                2, num_layers, batch_size, num_kv_heads, -(-capacity // page), head_dim, dtype=dtype, device=device
            )
        self.layers = [
            QuestLayer(
                layer.k, layer.v, low, high, page, 0 if i < dense_layers else budget, num_sinks, window
            )
            for i, (layer, low, high) in enumerate(zip(self.layers, *self._bounds.transpose(3, 4), strict=True))
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of key, value and bound memory."""
        return super().nbytes + self._bounds.nbytes

    def _move(self, nodes: Tensor, starts: Tensor) -> None:
        """Accepted rows widen the bounds of the pages that they come to."""
        super()._move(nodes, starts)
        keys = self._as_one_batch[0]
        slots = starts[:, None] + torch.arange(nodes.shape[1], dtype=torch.int32, device=nodes.device)
        slots = torch.where(nodes < 0, -1, slots)
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        low, high = (x.flatten(0, 1).transpose(1, 2) for x in self._bounds)
        ops.append_page_bounds(low, high, keys[rows, slots.long().clamp(min=0)], slots, self.page)

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        pages = -(-max(self.lengths, default=0) // self.page)
        with torch.inference_mode(self._bounds.is_inference()), torch.no_grad():
            self._bounds[:, :, :, :, :pages] = self._bounds[:, :, list(rows), :, :pages]
