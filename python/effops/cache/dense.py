"""The dense KV cache: one block of memory, every sequence with the same capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.memory import cache_memory
from effops.cache.plan import Lengths


class DenseLayer:
    """k [B,L,G,D] and v [B,L,G,Dv] of one layer: views of heads-major memory [B,G,L,D]."""

    __slots__ = ("k", "v")

    needs_queries = False

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        ops.append_kv(self.k, self.v, k, v, step.slots)

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        return ops.rotary_append(qkv, cos, sin, step.positions, self.k, self.v, step.slots)

    def attend(self, q: Tensor, step: Step, *, causal: bool = True, **options: Any) -> Tensor:
        if step.tree is None:
            out = ops.attention(
                q, self.k, self.v, causal=causal, kv_lens=step.kv_lens, max_kv_len=step.max_kv_len, **options
            )
        else:
            out = ops.tree_attention(
                q, self.k, self.v, step.tree.ancestors, depths=step.tree.depths, kv_lens=step.kv_lens,
                max_kv_len=step.max_kv_len, **options,
            )  # fmt: skip
        assert isinstance(out, Tensor)
        return out


class RotatingLayer(DenseLayer):
    """A dense layer that turns queries and keys first, for layers whose ``append`` does more than write keys."""

    __slots__ = ()

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        heads = qkv.shape[2] - 2 * self.k.shape[2]
        keys_end = heads + self.k.shape[2]
        turned = ops.rotary(qkv[:, :, :keys_end], cos, sin, step.positions)
        self.append(turned[:, :, heads:], qkv[:, :, keys_end:], step)
        return turned[:, :, :heads]


class DenseKVCache(Lengths):
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
            self._k = self._memory("k", *shape, head_dim, dtype=dtype, device=device)
            self._v = self._memory("v", *shape, v_head_dim or head_dim, dtype=dtype, device=device)
        super().__init__(batch_size, capacity, torch.device(device))
        self.k, self.v = self._k.transpose(2, 3), self._v.transpose(2, 3)
        self._as_one_batch = [x.flatten(0, 1).transpose(1, 2) for x in (self._k, self._v)]
        self.layers = [DenseLayer(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self._k, self._v, strict=True)]

    def _memory(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Where keys ("k") or values ("v") lie."""
        return cache_memory(*shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of key and value memory."""
        return self._k.nbytes + self._v.nbytes

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> Step:
        return self._plan(tokens, lengths, tree)

    def commit(self, accepted: AcceptedNodes) -> None:
        starts, moves = self._accept(accepted)
        if moves:
            self._move(*self._for_layers(accepted.nodes, starts, len(self.layers)))

    def _move(self, nodes: Tensor, starts: Tensor) -> None:
        """The rows of accepted nodes to where they stay, of all layers as one batch."""
        k, v = self._as_one_batch
        ops.commit_kv(k, v, nodes, starts)

    def rollback(self, lengths: Sequence[int]) -> None:
        self._shorten(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        lengths = self._reordered(rows)
        longest = max(lengths, default=0)
        with torch.inference_mode(self._k.is_inference()), torch.no_grad():
            for memory in (self._k, self._v):
                memory[:, :, :, :longest] = memory[:, list(rows), :, :longest]
        self._set_lengths(lengths)

    def reset(self) -> None:
        self._set_lengths([0] * self.batch_size)
