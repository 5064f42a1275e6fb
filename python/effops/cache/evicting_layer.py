"""One layer of the evicting cache: how its entries are written, attended to and chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.kept import Pooling, heaviest_entries, observed_entries, pooled

Policy = Literal["h2o", "snapkv"]


@dataclass(slots=True, kw_only=True)
class EvictingStep(Step):
    """A step over entries: ``slots`` are places behind the entries that each KV head holds before it, and ``kv_lens``
    counts the entries that its queries attend to."""

    new_positions: Tensor  # int32 [B,T], -1 for padding
    padding: Tensor | None  # bool [B,T]
    token_lens: Tensor  # int32 [B], tokens after the step
    new: list[int]
    held_before: list[int]
    held: list[int]
    compresses: bool  # attends to more entries than stay
    evicts: bool


@dataclass(frozen=True, slots=True)
class Eviction:
    """How entries are chosen: the options of ``HeavyHitterKVCache``."""

    policy: Policy
    budget: int
    recent: int
    num_sinks: int
    pooling: Pooling
    kernel_size: int


class HeavyHitterLayer:
    """One layer: k [B,S,G,D] and v [B,S,G,Dv], views of memory [B,G,S,D]; ``positions`` int32 [B,G,S], the token that
    each slot holds, -1 where it is free; ``mass`` [B,G,S], the attention that each entry has had (0 with SnapKV)."""

    __slots__ = ("_joined", "eviction", "k", "mass", "positions", "v", "written")

    needs_queries = True

    def __init__(self, k: Tensor, v: Tensor, mass: Tensor, positions: Tensor, eviction: Eviction) -> None:
        self.k, self.v, self.mass, self.positions, self.eviction = k, v, mass, positions, eviction
        self._joined: tuple[Tensor, Tensor] | None = None
        self.written = False

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        assert isinstance(step, EvictingStep)
        if step.compresses:
            self._joined = self._join(k, v, step)
            return
        self.written = True
        ops.append_evicting(
            self.k, self.v, k, v, self.mass, self.positions, step.new_positions, recent=self.eviction.recent,
            num_sinks=self.eviction.num_sinks,
        )  # fmt: skip

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        kv_heads = self.k.shape[2]
        values = qkv.shape[2] - kv_heads
        turned = ops.rotary(qkv[:, :, :values], cos, sin, step.positions)
        self.append(turned[:, :, values - kv_heads :], qkv[:, :, values:], step)
        return turned[:, :, : values - kv_heads]

    def close(self) -> None:
        """At the end of a pass, or after one that broke off."""
        self.written, self._joined = False, None

    def _join(self, k: Tensor, v: Tensor, step: EvictingStep) -> tuple[Tensor, Tensor]:
        """The entries and the new tokens behind them: what a pass attends to that leaves fewer."""
        before = max(step.held_before)
        if before == 0 and step.padding is None:
            return k, v
        joined = []
        for held, new in ((self.k, k), (self.v, v)):
            memory = new.new_empty(new.shape[0], new.shape[2], step.max_kv_len, new.shape[3])
            memory[:, :, :before] = held[:, :before].transpose(1, 2)
            joined.append(memory.transpose(1, 2))
        ops.append_kv(joined[0], joined[1], k, v, step.slots)
        return joined[0], joined[1]

    def attend(
        self, q: Tensor, step: Step, *, causal: bool = True, window: int | None = None, **options: Any
    ) -> Tensor:
        assert isinstance(step, EvictingStep)
        if window and window < step.span:
            raise ValueError(
                f"HeavyHitterKVCache: window: expected None or at least {step.span}, the tokens so far, got {window}"
            )
        k, v = (self.k, self.v) if self._joined is None else self._joined
        out, lse = ops.attention(
            q, k, v, causal=causal, kv_lens=step.kv_lens, max_kv_len=step.max_kv_len, return_lse=True, **options
        )
        if step.padding is not None:  # rows of no token
            lse.masked_fill_(step.padding[:, -q.shape[1] :, None], -torch.inf)
        scores = {name: options[name] for name in ("softcap", "scale") if options.get(name) is not None}
        scores |= {"causal": causal, "kv_lens": step.kv_lens}
        if self._joined is not None:
            self.written = True
            self._compress(q, k, v, lse, step, scores)
            self._joined = None
        elif self.eviction.policy == "h2o":
            ops.accumulate_mass(self.mass, q, k, lse, **scores)
        return out

    def _compress(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, step: EvictingStep, scores: dict[str, Any]
    ) -> None:
        e = self.eviction
        before, rows = max(step.held_before), e.recent if e.policy == "snapkv" else q.shape[1]
        shape = (*self.mass.shape[:2], k.shape[1])
        mass, positions = self.mass.new_zeros(shape), self.positions.new_full(shape, -1)
        positions[..., :before] = self.positions[..., :before]
        if e.policy == "h2o":
            mass[..., :before] = self.mass[..., :before].masked_fill(positions[..., :before] < 0, 0)
        ops.accumulate_mass(mass, q[:, -rows:], k, lse[:, -rows:], **scores)
        for b, (new, after) in enumerate(zip(step.new, step.held, strict=True)):
            if new == 0:
                continue
            entries = step.held_before[b] + new
            positions[b, :, step.held_before[b] : entries] = step.new_positions[b, -new:]
            own, weights = positions[b, :, :entries], mass[b, :, :entries]
            if entries <= after:
                chosen = torch.arange(entries, device=own.device).expand(own.shape[0], -1)
            elif e.policy == "h2o":
                chosen = heaviest_entries(weights, own, after, e.recent, e.num_sinks)
            else:
                weights[:, : entries - rows] = pooled(weights[:, : entries - rows], e.pooling, e.kernel_size)
                chosen = observed_entries(weights, own, after, e.recent, e.num_sinks)
            self.positions[b, :, :after] = own.gather(1, chosen)
            self.positions[b, :, after:] = -1
            self.mass[b, :, :after] = weights.gather(1, chosen) if e.policy == "h2o" else 0
            for memory, joined in ((self.k, k), (self.v, v)):
                index = chosen.T[..., None].expand(-1, -1, joined.shape[3])
                memory[b, :after] = joined[b].gather(0, index)
