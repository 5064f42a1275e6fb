"""The labelled KV cache of Double Sparsity: beside every key a few of its channels, by which a decode step finds the
tokens that it attends to (arXiv 2408.07092)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.dense import DenseKVCache, DenseLayer
from effops.cache.memory import cache_memory
from effops.cache.selecting import SelectingLayer

Statistic = Literal["qk", "q", "k"]


@dataclass(frozen=True)
class LabelChannels:
    """What calibration finds of a model: the channels of each KV head, those that tell keys apart best first, and the
    range of each channel's keys.

    ``order`` int32 [layers, G, D]; ``low`` and ``high`` float32 [layers, G, D], by channel, not in ``order``.
    """

    order: Tensor
    low: Tensor
    high: Tensor

    def save(self, path: str | Path) -> None:
        """Into one safetensors file."""
        from safetensors.torch import save_file

        tensors = {"order": self.order, "low": self.low, "high": self.high}
        save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> LabelChannels:
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        if set(tensors) != {"order", "low", "high"}:
            raise ValueError(f"LabelChannels: {path}: expected order, low and high, got {sorted(tensors)}")
        return cls(**tensors)

    def first(self, layer: int, count: int, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Channels int32 [G, count] of a layer, and for labels of so many bits scales and offsets float32 [G, count]:
        the range in equal steps. Numbers are stored less the middle of their range."""
        channels = self.order[layer, :, :count]
        low, high = (x[layer].gather(1, channels.long()) for x in (self.low, self.high))
        if bits == 0:
            return channels, None, (low + high) / 2
        scales = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        return channels, scales, low + scales * 2 ** (bits - 1)


class _CalibrationLayer(DenseLayer):
    """Sums what the statistic needs over the tokens that pass."""

    __slots__ = ("high", "keys", "low", "products", "queries")

    def __init__(self, k: Tensor, v: Tensor, heads: int) -> None:
        super().__init__(k, v)
        kv_heads, dim = k.shape[2:]
        self.products, self.queries = (torch.zeros(heads, dim, dtype=torch.float64) for _ in range(2))
        self.keys = torch.zeros(kv_heads, dim, dtype=torch.float64)
        self.low, self.high = torch.full((kv_heads, dim), torch.inf), torch.full((kv_heads, dim), -torch.inf)

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        keys = torch.stack([self.k[b, n - q.shape[1] : n] for b, n in enumerate(step.lengths)]).float().cpu()
        queries = q.float().cpu()
        repeated = keys.repeat_interleave(q.shape[2] // keys.shape[2], 2)
        self.products += (queries * repeated).abs().double().sum((0, 1))
        self.queries += queries.abs().double().sum((0, 1))
        self.keys += keys.abs().double().sum((0, 1))
        self.low = torch.minimum(self.low, keys.amin((0, 1)))
        self.high = torch.maximum(self.high, keys.amax((0, 1)))
        return super().attend(q, step, causal=causal, **options)

    def importance(self, statistic: Statistic) -> Tensor:
        """[G, D]: a KV head's is the sum of its query heads'."""
        if statistic == "k":
            return self.keys
        mine = self.products if statistic == "qk" else self.queries
        return mine.unflatten(0, (self.keys.shape[0], -1)).sum(1)


def calibrate_channels(model: Any, batches: Iterable[Tensor], *, statistic: Statistic = "qk") -> LabelChannels:
    """Ranks the channels of every KV head over all of the given tokens.

    Args:
        model: one of ``effops.models``, with ordinary attention.
        batches: int64 ``[B, T]`` each, such as 256 samples in blocks of 512 tokens.
        statistic: by what channels are ranked, as a mean over tokens and a sum over a KV head's query heads:
            ``"qk"`` of ``|q[c] k[c]|`` of the same token, ``"q"`` of ``|q[c]|``, ``"k"`` of ``|k[c]|``; of queries and
            keys as they are multiplied, rotated.

    Raises:
        ValueError: another statistic, or no batch.
    """
    if statistic not in ("qk", "q", "k"):
        raise ValueError(f"calibrate_channels: statistic: expected qk, q or k, got {statistic!r}")
    layers: list[_CalibrationLayer] = []
    for tokens in batches:
        cache = model.new_cache(*tokens.shape)
        heads = model.config.num_attention_heads
        fresh = [_CalibrationLayer(layer.k, layer.v, heads) for layer in cache.layers]
        for old, new in zip(layers, fresh, strict=False):
            for name in _CalibrationLayer.__slots__:
                setattr(new, name, getattr(old, name))
        layers = cache.layers = fresh
        model.hidden_states(tokens, cache)  # all positions: with `keep` the last layer would see few queries
    if not layers:
        raise ValueError("calibrate_channels: batches: expected one or more, got none")
    order = [layer.importance(statistic).argsort(dim=1, descending=True, stable=True) for layer in layers]
    low, high = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("low", "high"))
    return LabelChannels(torch.stack(order).int(), low, high)


class LabelledLayer(SelectingLayer):
    """Keys, values and labels of one layer. ``labels`` [B,L,G,r], or words of few bits; memory [B,G,words,L]."""

    __slots__ = ("_options", "channels", "labels", "offsets", "scales")

    def __init__(
        self, k: Tensor, v: Tensor, labels: Tensor, channels: tuple[Tensor, Tensor | None, Tensor], bits: int,
        budget: int, num_sinks: int, window: int,
    ) -> None:  # fmt: skip
        super().__init__(k, v, budget, num_sinks, window)
        self.labels = labels
        ids, scales, offsets = channels
        self.channels, self.offsets = ids.to(k.device), offsets.to(k.device)
        self.scales = None if scales is None else scales.to(k.device)
        self._options: dict[str, Any] = {"bits": bits} | ({} if self.scales is None else {"scales": self.scales})

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        super().append(k, v, step)
        ops.append_labels(self.labels, k, step.slots, self.channels, offsets=self.offsets, **self._options)

    def _select(self, q: Tensor, step: Step) -> Tensor:
        return ops.label_topk(
            q, self.labels, self.channels, self.budget, kv_lens=step.kv_lens, num_sinks=self.num_sinks,
            window=self.window, **self._options,
        )  # fmt: skip


class LabelledKVCache(DenseKVCache):
    """A dense cache whose decode steps attend to ``budget`` tokens a KV head: the first ``num_sinks``, the last
    ``window`` (the new one among them) and those that labels say matter most.

    Prompts, trees, layers with a window of their own and the first ``dense_layers`` layers see every key, and so do all
    until a sequence is longer than the budget. Labels take ``num_channels * bits / 8`` bytes a token and KV head (bits
    0: numbers of the cache's dtype); nothing is evicted, so that any token may be chosen again.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        channels: LabelChannels,
        budget: int,
        num_channels: int,
        bits: int = 4,
        num_sinks: int = 4,
        window: int = 16,
        dense_layers: int = 2,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if tuple(channels.order.shape) != (num_layers, num_kv_heads, head_dim):
            sizes = (num_layers, num_kv_heads, head_dim)
            raise self._error("channels", f"those of layers, KV heads, D = {sizes}", tuple(channels.order.shape))
        if not 1 <= num_channels <= head_dim:
            raise self._error("num_channels", f"a number in [1, {head_dim}]", num_channels)
        if bits not in (0, 4, 8):
            raise self._error("bits", "0, 4 or 8", bits)
        if not (num_sinks >= 0 and window >= 1 and budget >= num_sinks + window):
            least = f"num_sinks + window = {num_sinks} + {window} or more, window 1 or more"
            raise self._error("budget", least, budget)
        super().__init__(
            num_layers, batch_size, capacity, num_kv_heads, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device
        )
        words = num_channels if bits == 0 else -(-num_channels * bits // 32)
        with torch.inference_mode(False):
            self._labels = cache_memory(
                num_layers, batch_size, num_kv_heads, words, capacity,
                dtype=torch.int32 if bits else torch.float32 if dtype == torch.float64 else dtype, device=device,
            )  # fmt: skip
        self.layers = [
            self._layer(
                i, layer.k, layer.v, labels.permute(0, 3, 1, 2), channels.first(i, num_channels, bits), bits,
                0 if i < dense_layers else budget, num_sinks, window,
            )
            for i, (layer, labels) in enumerate(zip(self.layers, self._labels, strict=True))
        ]  # fmt: skip

    def _layer(self, index: int, *parts: Any) -> LabelledLayer:
        return LabelledLayer(*parts)

    @property
    def nbytes(self) -> int:
        """Bytes of key, value and label memory."""
        return super().nbytes + self._labels.nbytes

    def _move(self, nodes: Tensor, starts: Tensor) -> None:
        super()._move(nodes, starts)
        words = self._labels.view(torch.float32) if self._labels.dtype == torch.int32 else self._labels
        rows = words.flatten(0, 1).permute(0, 3, 1, 2)
        ops.commit_kv(rows, rows[..., :0], nodes, starts)

    def reorder(self, rows: Sequence[int]) -> None:
        super().reorder(rows)
        longest = max(self.lengths, default=0)
        with torch.inference_mode(self._labels.is_inference()), torch.no_grad():
            self._labels[..., :longest] = self._labels[:, list(rows), ..., :longest]
