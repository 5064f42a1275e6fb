"""The labelled cache whose keys and values lie in a file: labels alone stay in memory, and the tokens that they select
are fetched while the layer before computes (the offloading of Double Sparsity, arXiv 2408.07092, section 3.3)."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.labelled import LabelledKVCache, LabelledLayer


@dataclass
class Traffic:
    """Rows (a token's key and value of one KV head) that decode steps attended to: fetched before they were asked for,
    and fetched when they were."""

    prefetched: int = 0
    waited_for: int = 0

    @property
    def hit_rate(self) -> float:
        """The share that was there in time; 0 of nothing."""
        return self.prefetched / max(1, self.prefetched + self.waited_for)


@dataclass
class _Rows:
    """``lists`` int32 [B,G,S], ascending, -1 for none, and their keys and values [B,G,S,D]."""

    lists: Tensor
    k: Tensor
    v: Tensor


def fetch_rows(k: Tensor, v: Tensor, lists: Tensor) -> _Rows:
    """The listed rows of k [B,L,G,D] and v [B,L,G,Dv], side by side; -1 fetches token 0, which nobody then looks at."""
    batch, heads = lists.shape[:2]
    b, g = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
    at = lists.long().clamp(min=0)
    return _Rows(lists, k[b, at, g], v[b, at, g])


class OffloadedLayer(LabelledLayer):
    """A labelled layer over a file. ``_attend_listed`` gathers what the lists name and attends to the copy: the same
    rows in the same order, so that results are those of the resident cache, bit for bit."""

    __slots__ = ("_cache", "_coming", "_index", "_last")

    def __init__(self, cache: OffloadedKVCache, index: int, *parts: Any) -> None:
        super().__init__(*parts)
        self._cache, self._index = cache, index
        self._last: Tensor | None = None  # what the last step selected
        self._coming: Future[_Rows] | None = None

    def prefetch(self) -> None:
        """Starts to fetch what the last step selected: most of it is selected again."""
        if self._last is not None and self._coming is None:
            self._coming = self._cache.pool.submit(fetch_rows, self.k, self.v, self._last)

    def forget(self) -> None:
        """After anything but appending: what was selected may lie elsewhere."""
        if self._coming is not None:
            self._coming.result()
        self._last = self._coming = None

    def _attend_listed(self, q: Tensor, indices: Tensor, step: Step, **options: Any) -> Tensor:
        cache = self._cache
        rows = self._rows(indices, step)
        if self._index + 1 < len(cache.layers):
            cache.layers[self._index + 1].prefetch()  # fetches while this layer computes
        self._last = indices
        slots = torch.arange(indices.shape[2], dtype=torch.int32)
        local = torch.where(indices < 0, -1, slots)
        out = ops.sparse_attention(q, rows.k.transpose(1, 2), rows.v.transpose(1, 2), local, **options)
        assert isinstance(out, Tensor)
        return out

    def _rows(self, indices: Tensor, step: Step) -> _Rows:
        there, self._coming = self._coming, None
        named = indices >= 0
        if there is None or there.result().lists.shape != indices.shape:
            self._cache.traffic.waited_for += int(named.sum())
            return fetch_rows(self.k, self.v, indices)
        rows = there.result()
        # -1 stands last: as the largest number, lists ascend.
        held = rows.lists.masked_fill(rows.lists < 0, torch.iinfo(torch.int32).max)
        place = torch.searchsorted(held, indices.contiguous()).clamp(max=held.shape[2] - 1)
        earlier = indices < (step.kv_lens - 1)[:, None, None]  # the new token was not there, or was another
        found = (rows.lists.gather(2, place) == indices) & named & earlier
        missing = (named & ~found).nonzero(as_tuple=True)
        k, v = (x.gather(2, place[..., None].expand(-1, -1, -1, x.shape[3])) for x in (rows.k, rows.v))
        b, g, _ = missing
        tokens = indices[missing].long()
        k[missing], v[missing] = self.k[b, tokens, g], self.v[b, tokens, g]
        self._cache.traffic.prefetched += int(found.sum())
        self._cache.traffic.waited_for += len(tokens)
        return _Rows(indices, k, v)


class OffloadedKVCache(LabelledKVCache):
    """A labelled cache whose keys and values lie in a file of ``directory``, which goes with the cache; in memory are
    the labels, and the rows that one or two layers attend to.

    A decode step fetches the rows that the labels select, while the layer before computes: those that the last step
    selected, and when the new selection is known the few that are new. ``traffic`` counts both. Results are those of
    :class:`LabelledKVCache` over the same tokens, bit for bit. Prompts, trees and dense layers read the whole file.
    """

    layers: list[OffloadedLayer]  # type: ignore[assignment]  # of a wider type there

    def __init__(self, *sizes: int, directory: str | Path, **options: Any) -> None:
        device = torch.device(options.get("device", "cpu"))
        if device.type != "cpu":
            raise self._error("device", "cpu", device)
        if not Path(directory).is_dir():
            raise self._error("directory", "a directory that exists", repr(str(directory)))
        self._directory = Path(directory)
        self.pool = ThreadPoolExecutor(1, "effops-fetch")
        self.traffic = Traffic()
        super().__init__(*sizes, **options)

    def _memory(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        handle, path = tempfile.mkstemp(f".{name}", "effops-", self._directory)
        os.close(handle)
        count = torch.Size(shape).numel()
        try:
            if count == 0:
                return torch.empty(*shape, dtype=dtype)
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.unlink(path)  # it stays until the mapping goes

    def _layer(self, index: int, *parts: Any) -> OffloadedLayer:
        return OffloadedLayer(self, index, *parts)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: labels, and the rows of two layers."""
        row = sum(x.shape[-1] * x.element_size() for x in (self._k, self._v))
        budget = max((layer.budget for layer in self.layers), default=0)
        return self._labels.nbytes + 2 * self.batch_size * self._k.shape[2] * budget * row

    @property
    def file_nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._k.nbytes + self._v.nbytes

    def _set_lengths(self, lengths: list[int]) -> None:
        super()._set_lengths(lengths)
        for layer in getattr(self, "layers", ()):
            layer.forget()

    def _move(self, nodes: Tensor, starts: Tensor) -> None:
        for layer in self.layers:
            layer.forget()
        super()._move(nodes, starts)
