"""One layer of the merged cache: how a prompt is attended to, then compressed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import Step
from effops.cache.kept import heaviest_entries
from effops.ops.merging import Merging


@dataclass(slots=True, kw_only=True)
class MergedStep(Step):
    """A step over entries: ``slots`` are places behind the entries that a sequence holds before it, and ``kv_lens``
    counts the entries that its queries attend to."""

    token_lens: Tensor  # int32 [B], tokens after the step
    padding: Tensor | None  # bool [B,T]
    new: list[int]
    attended: list[int]
    held: list[int]  # entries after the step: fewer than attended to by a prompt that is compressed
    recent: list[int]  # newest entries of a prompt, which stay
    protected: Tensor | None  # bool [B,T], tokens of a prompt that stay

    @property
    def compresses(self) -> bool:
        return self.held != self.attended


class MergedLayer:
    """One layer: k [B,S,G,D] and v [B,S,G,Dv], views of memory [B,G,S,D]."""

    __slots__ = ("_joined", "k", "least_similarity", "merging", "num_sinks", "v")

    needs_queries = True

    def __init__(
        self, k: Tensor, v: Tensor, *, merging: Merging, num_sinks: int, least_similarity: float | None
    ) -> None:
        self.k, self.v, self.merging, self.num_sinks = k, v, merging, num_sinks
        self.least_similarity = least_similarity
        self._joined: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        assert isinstance(step, MergedStep)
        self._joined = self._join(k, v, step) if step.compresses else None
        k_cache, v_cache = (self.k, self.v) if self._joined is None else self._joined
        ops.append_kv(k_cache, v_cache, k, v, step.slots)

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        assert isinstance(step, MergedStep)
        if not step.compresses:
            self._joined = None
            return ops.rotary_append(qkv, cos, sin, step.positions, self.k, self.v, step.slots)
        kv_heads = self.k.shape[2]
        values = qkv.shape[2] - kv_heads
        turned = ops.rotary(qkv[:, :, :values], cos, sin, step.positions)
        self.append(turned[:, :, values - kv_heads :], qkv[:, :, values:], step)
        return turned[:, :, : values - kv_heads]

    def close(self) -> None:
        """At the end of a pass, or after one that broke off."""
        self._joined = None

    def _join(self, k: Tensor, v: Tensor, step: MergedStep) -> tuple[Tensor, Tensor]:
        """Memory for what a pass attends to that leaves fewer entries; those from before it are there already."""
        before = max(n - m for n, m in zip(step.attended, step.new, strict=True))
        joined = []
        for held, new in ((self.k, k), (self.v, v)):
            memory = new.new_empty(new.shape[0], new.shape[2], step.max_kv_len, new.shape[3])
            memory[:, :, :before] = held[:, :before].transpose(1, 2)
            joined.append(memory.transpose(1, 2))
        return joined[0], joined[1]

    def attend(
        self, q: Tensor, step: Step, *, causal: bool = True, window: int | None = None, **options: Any
    ) -> Tensor:
        assert isinstance(step, MergedStep)
        if window and window < step.span:
            raise ValueError(
                f"MergedKVCache: window: expected None or at least {step.span}, the tokens so far, got {window}"
            )
        masks: dict[str, Any] = {"causal": causal, "kv_lens": step.kv_lens}
        if self._joined is None:
            out = ops.attention(q, self.k, self.v, max_kv_len=step.max_kv_len, **masks, **options)
            assert isinstance(out, Tensor)
            return out
        k, v = self._joined
        out, lse = ops.attention(q, k, v, max_kv_len=step.max_kv_len, return_lse=True, **masks, **options)
        if step.padding is not None:  # rows of no token
            lse.masked_fill_(step.padding[..., None], -torch.inf)
        masks |= {name: options[name] for name in ("softcap", "scale") if options.get(name) is not None}
        mass = lse.new_zeros(k.shape[0], k.shape[2], k.shape[1])
        ops.accumulate_mass(mass, q, k, lse, **masks)
        ops.merge_kv(
            k,
            v,
            self._kept(mass, step),
            kv_lens=step.kv_lens,
            merging=self.merging,
            least_similarity=self.least_similarity,
        )
        longest = max(step.held)
        self.k[:, :longest], self.v[:, :longest] = k[:, :longest], v[:, :longest]
        self._joined = None
        return out

    def _kept(self, mass: Tensor, step: MergedStep) -> Tensor:
        """int32 [B,G,N], the entries that stay: all, or of a prompt its recent and protected ones and the heaviest."""
        heads = mass.shape[1]
        kept = torch.full((mass.shape[0], heads, max(step.held)), -1, dtype=torch.int32, device=mass.device)
        entries = torch.arange(mass.shape[2], dtype=torch.int32, device=mass.device).expand(heads, -1)
        for b, (count, after) in enumerate(zip(step.attended, step.held, strict=True)):
            own = entries[:, :count]
            if after < count:
                weights = mass[b, :, :count]
                weights[:, : self.num_sinks] = torch.inf
                if step.protected is not None:
                    weights.masked_fill_(step.protected[b, -count:], torch.inf)
                own = heaviest_entries(weights, own, after, step.recent[b], 0)
            kept[b, :, :after] = own
        return kept
