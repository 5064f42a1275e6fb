"""The dense KV cache: one block of memory, every sequence with the same capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step


class DenseLayer:
    """k [B,L,G,D] and v [B,L,G,Dv] of one layer: views of heads-major memory [B,G,L,D]."""

    __slots__ = ("k", "v")

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        ops.append_kv(self.k, self.v, k, v, step.slots)

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        return ops.rotary_append(qkv, cos, sin, step.positions, self.k, self.v, step.slots)

    def attend(self, q: Tensor, step: Step, **options: Any) -> Tensor:
        out = ops.attention(q, self.k, self.v, kv_lens=step.kv_lens, max_kv_len=step.max_kv_len, **options)
        assert isinstance(out, Tensor)
        return out


class DenseKVCache:
    """Keys and values of ``num_layers`` layers in memory [layers][B,G,L,D], seen as [B,L,G,D].

    Sequences may have different lengths. Memory is not cleared: keys past a sequence's length are never read.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, capacity)
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self._k = torch.empty(*shape, head_dim, dtype=dtype, device=device)
            self._v = torch.empty(*shape, v_head_dim or head_dim, dtype=dtype, device=device)
            self._range = torch.arange(capacity, dtype=torch.int32, device=device)
        self.layers = [DenseLayer(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self._k, self._v, strict=True)]
        self.reset()

    @property
    def batch_size(self) -> int:
        return self._k.shape[1]

    @property
    def capacity(self) -> int:
        return self._k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of key and value memory."""
        return self._k.nbytes + self._v.nbytes

    @property
    def kv_lens(self) -> Tensor:
        """int32 [B]: keys held of each sequence."""
        return self._kv_lens

    def reset(self) -> None:
        self.lengths = [0] * self.batch_size
        with torch.inference_mode(False):
            self._kv_lens = torch.zeros(self.batch_size, dtype=torch.int32, device=self._k.device)

    def plan(self, tokens: int, lengths: Sequence[int] | None = None) -> Step:
        new = [tokens] * self.batch_size if lengths is None else list(lengths)
        if len(new) != self.batch_size or not all(0 <= n <= tokens for n in new):
            raise ValueError(f"DenseKVCache: lengths: expected {self.batch_size} numbers from 0 to {tokens}, got {new}")
        after = [a + b for a, b in zip(self.lengths, new, strict=True)]
        longest = max(after, default=0)
        if longest > self.capacity:
            raise ValueError(f"DenseKVCache: tokens: expected at most {self.capacity} a sequence, got {longest}")
        if lengths is None:
            if min(self.lengths, default=0) == longest - tokens:  # all alike: a slice, no arithmetic
                slots = self._range[longest - tokens : longest].expand(self.batch_size, -1)
            else:
                slots = self._kv_lens[:, None] + self._range[:tokens]
            return Step(slots, slots, self._kv_lens + tokens, after, longest)

        count = torch.tensor(new, dtype=torch.int32, device=self._k.device)
        kv_lens = self._kv_lens + count
        column = torch.arange(tokens, dtype=torch.int32, device=self._k.device)
        padding = column < tokens - count[:, None]
        place = kv_lens[:, None] - tokens + column
        return Step(place.masked_fill(padding, 0), place.masked_fill(padding, -1), kv_lens, after, longest)

    def advance(self, step: Step) -> None:
        self.lengths = step.lengths
        self._kv_lens = step.kv_lens
