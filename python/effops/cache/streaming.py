"""Caches of constant size for streaming heads: attention sinks and a ring of recent tokens (StreamingLLM, arXiv
2309.17453), beside whole caches for the heads that retrieve (DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from effops import ops
from effops.cache.base import AcceptedNodes, Step, TreeNodes
from effops.cache.memory import cache_memory
from effops.cache.plan import Lengths


class RotaryTables(Protocol):
    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [length or more, R/2], as ``ops.rotary`` reads them."""
        ...


@dataclass(slots=True)
class StreamingStep(Step):
    """``fresh``: the step is attended to as it comes, for the rings cannot hold it. With positions in the cache:
    ``evicted`` int32 [B,T], the tokens between the sinks and the ring before the step; ``kv_starts`` and ``sink_lens``
    int32 [B] say what is in the ring and which sinks are apart from it."""

    fresh: bool = False
    evicted: Tensor | None = None
    kv_starts: Tensor | None = None
    sink_lens: Tensor | None = None


class StreamingLayer:
    """k [P,page,G,D] and v [P,page,G,Dv] of one layer: pages of single heads, which every head reads through a table of
    its own, ``page_table`` int32 [B,G,entries]. Entries of a streaming head name the pages of its ring over and over:
    those of evicted tokens are never read."""

    __slots__ = ("_cache", "_fresh", "_windows", "full", "k", "page_table", "v")

    needs_queries = False

    def __init__(self, cache: StreamingKVCache, full: Tensor, k: Tensor, v: Tensor, table: Tensor) -> None:
        self._cache, self.full, self.page_table = cache, full, table
        heads = full.shape[0]
        self.k, self.v = (x[:, :, None].expand(-1, -1, heads, -1) for x in (k, v))
        windows = torch.full((heads,), cache.window, dtype=torch.int32)
        self._windows = windows.masked_fill(full.cpu(), 0).to(k.device)
        self._fresh: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        assert isinstance(step, StreamingStep)
        if not step.fresh:
            ops.append_kv(self.k, self.v, k, v, step.slots, page_table=self.page_table)
            return
        self._fresh = k, v
        kept = self._cache._kept_slots(step)
        for heads, slots in ((self.full.nonzero()[:, 0], step.slots), ((~self.full).nonzero()[:, 0], kept)):
            count = heads.shape[0]
            if count:
                table = self.page_table[:, heads]
                ops.append_kv(self.k[:, :, :count], self.v[:, :, :count], k[:, :, heads], v[:, :, heads], slots,
                              page_table=table)  # fmt: skip

    def rotary_append(self, qkv: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        assert isinstance(step, StreamingStep)
        if not step.fresh:
            return ops.rotary_append(
                qkv, cos, sin, step.positions, self.k, self.v, step.slots, page_table=self.page_table
            )
        heads = qkv.shape[2] - 2 * self.k.shape[2]
        keys_end = heads + self.k.shape[2]
        turned = ops.rotary(qkv[:, :, :keys_end], cos, sin, step.positions)
        self.append(turned[:, :, heads:], qkv[:, :, keys_end:], step)
        return turned[:, :, :heads]

    def attend(
        self, q: Tensor, step: Step, *, causal: bool = True, window: int | None = None, **options: Any
    ) -> Tensor:
        assert isinstance(step, StreamingStep)
        cache = self._cache
        if window:
            raise ValueError(f"{type(cache).__name__}: window: expected layers without one of their own, got {window}")
        if step.fresh:
            out = self._attend_fresh(q, step, causal=causal, **options)
        elif cache.position_mode == "absolute":
            masks = {"head_windows": self._windows, "num_sinks": cache.num_sinks}
            out = self._attend_pages(q, step, causal=causal, **masks, **options)
        else:
            out = self._attend_at_cache_positions(q, step, causal=causal, **options)
        assert isinstance(out, Tensor)
        return out

    def _attend_fresh(self, q: Tensor, step: StreamingStep, **options: Any) -> Any:
        """The first tokens of every sequence, longer than a step: over their keys and values as they came."""
        assert self._fresh is not None
        k, v = self._fresh
        self._fresh = None
        starts = None if step.max_kv_len == k.shape[1] == min(step.lengths, default=0) else k.shape[1] - step.kv_lens
        if self._cache.position_mode == "absolute":
            options |= {"head_windows": self._windows, "num_sinks": self._cache.num_sinks}
        return ops.attention(q, k, v, kv_starts=starts, **options)

    def _attend_pages(self, q: Tensor, step: StreamingStep, *, causal: bool, **options: Any) -> Any:
        options["max_kv_len"] = step.max_kv_len
        if step.tree is None:
            return ops.paged_attention(q, self.k, self.v, self.page_table, step.kv_lens, causal=causal, **options)
        return ops.tree_attention(
            q, self.k, self.v, step.tree.ancestors, depths=step.tree.depths, kv_lens=step.kv_lens,
            page_table=self.page_table, **options,
        )  # fmt: skip

    def _attend_at_cache_positions(self, q: Tensor, step: StreamingStep, **options: Any) -> Any:
        """Where tokens were evicted, sinks are as far away as if they had never been: the query is turned back by their
        number for the sinks' part, which joins the ring's by log-sum-exp. No key is ever turned again."""
        if step.evicted is None:
            return self._attend_pages(q, step, **options)
        cache = self._cache
        assert cache.rotary is not None and step.sink_lens is not None
        cos, sin = cache.rotary.tables(step.span, q.device)
        gain = cos[:1, :1]  # some tables scale what they turn: once is enough
        near = ops.rotary(q, cos / gain, -sin / gain, step.evicted[:, step.evicted.shape[1] - q.shape[1] :])
        entries = -(-cache.num_sinks // cache.page_size)
        pages = {"softcap": options.get("softcap", 0.0), "scale": options.get("scale")}
        sinks = ops.paged_attention(
            near, self.k, self.v, self.page_table[:, :, :entries], step.sink_lens, return_lse=True, **pages
        )
        ring = self._attend_pages(q, step, kv_starts=step.kv_starts, return_lse=True, **options)
        outs, lses = (torch.stack(x) for x in zip(sinks, ring, strict=True))
        return ops.merge_states(outs, lses)[0]


class StreamingKVCache(Lengths):
    """Of every sequence and KV head the first ``num_sinks`` tokens and a ring of the last ``window``; all tokens of the
    heads in ``full_heads``.

    A query sees the sinks and the last ``window`` keys, its own among them. Memory [pages, page, D] a layer: a ring has
    ``window + step_tokens`` slots and up to a page more, so that a step of so many new tokens, or a tree of so many
    nodes, loses nothing that it sees and as many tokens may be rolled back. The first tokens of a batch may be more:
    they are attended to as they come. ``capacity`` bounds positions; it costs memory in full heads alone.

    ``position_mode="absolute"``: keys and queries stand where their tokens do; decoding has the results of
    ``ops.attention(..., window=window, num_sinks=num_sinks)``, however the tokens came. ``"cache"`` (StreamingLLM):
    sinks are as near as if evicted tokens had never been. A step then sees what the cache held before it and its own
    tokens, the first tokens all of each other; for steps of one token both modes see the same keys. It needs
    ``rotary``, what turns the model's queries and keys, and has no full heads.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int,
        num_sinks: int = 4,
        full_heads: Tensor | None = None,
        position_mode: Literal["absolute", "cache"] = "absolute",
        rotary: RotaryTables | None = None,
        step_tokens: int = 64,
        page_size: int = 16,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if full_heads is None:
            full_heads = torch.zeros(num_layers, num_kv_heads, dtype=torch.bool)
        for name, value, least in (("window", window, 1), ("num_sinks", num_sinks, 0),
                                   ("step_tokens", step_tokens, 1), ("page_size", page_size, 1)):  # fmt: skip
            if value < least:
                raise self._error(name, f"{least} or more", value)
        if full_heads.dtype != torch.bool or tuple(full_heads.shape) != (num_layers, num_kv_heads):
            got = f"{full_heads.dtype} {tuple(full_heads.shape)}"
            raise self._error("full_heads", f"torch.bool {(num_layers, num_kv_heads)}", got)
        if position_mode not in ("absolute", "cache"):
            raise self._error("position_mode", "absolute or cache", repr(position_mode))
        if position_mode == "cache" and (rotary is None or full_heads.any()):
            raise self._error("position_mode", "absolute without rotary, or beside full heads", "'cache'")
        self.window, self.num_sinks, self.full_heads = window, num_sinks, full_heads
        self.position_mode, self.rotary, self.step_tokens = position_mode, rotary, step_tokens
        self.page_size = page_size
        self._sink_pages = -(-num_sinks // page_size)
        self._ring_pages = -(-(window - 1 + step_tokens) // page_size)
        super().__init__(batch_size, capacity, torch.device(device))
        with torch.inference_mode(False):  # usable both inside and outside of inference mode
            self.layers = [self._layer(full, head_dim, v_head_dim or head_dim, dtype) for full in full_heads]
        self._written = [0] * batch_size  # one more than the last token that was ever written of each sequence

    def _layer(self, full: Tensor, dim: int, v_dim: int, dtype: torch.dtype) -> StreamingLayer:
        """Pages [B, heads one after the other] and the table that names them by absolute position."""
        entries = -(-self.capacity // self.page_size)
        at = torch.arange(entries)
        ring = self._sink_pages + (at - self._sink_pages).clamp(min=0) % self._ring_pages
        ring = torch.where(at < self._sink_pages, at, ring)
        own = min(entries, self._sink_pages + self._ring_pages)  # pages of a streaming head
        counts = torch.where(full, entries, own)
        begins = counts.cumsum(0) - counts
        table = torch.stack([begin + (at if whole else ring) for begin, whole in zip(begins, full, strict=True)])
        a_sequence = int(counts.sum())
        table = table + a_sequence * torch.arange(self.batch_size)[:, None, None]
        # Zero, for a mask hides keys by arithmetic: what lies there must be finite.
        k, v = (
            cache_memory(self.batch_size * a_sequence, self.page_size, d, dtype=dtype, device=self._device).zero_()
            for d in (dim, v_dim)
        )
        return StreamingLayer(self, full, k, v, table.int().to(self._device))

    @property
    def nbytes(self) -> int:
        """Bytes of key and value memory."""
        return sum(x[:, :, 0].nbytes for layer in self.layers for x in (layer.k, layer.v))

    def plan(self, tokens: int, lengths: Sequence[int] | None = None, tree: TreeNodes | None = None) -> Step:
        fresh = tokens > self.step_tokens
        if fresh and (tree is not None or any(self.lengths)):
            beside = "nodes" if tree is not None else "new tokens beside tokens held"
            raise self._error("tokens", f"at most {self.step_tokens} {beside}", tokens)
        base = self._plan(tokens, lengths, tree)
        step = StreamingStep(base.positions, base.slots, base.kv_lens, base.lengths, base.max_kv_len, base.span,
                             base.tree, fresh=fresh)  # fmt: skip
        if self.position_mode == "cache" and not fresh:
            self._place_sinks(step)
        self._written = [max(x) for x in zip(self._written, step.lengths, strict=True)]
        return step

    def _place_sinks(self, step: StreamingStep) -> None:
        held, sinks = torch.tensor(self.lengths), self.num_sinks
        first = held - (self.window - 1)  # of the ring
        evicted = (first - sinks).clamp(min=0)
        if not evicted.any():
            return
        apart = evicted > 0
        here = torch.tensor(step.lengths) > 0
        step.evicted = evicted[:, None].expand(step.positions.shape).int().to(self._device)
        step.kv_starts = torch.where(apart & here, first, 0).int().to(self._device)
        step.sink_lens = torch.where(apart & here, sinks, 0).int().to(self._device)

    def _kept_slots(self, step: Step) -> Tensor:
        """The slots of a step's tokens that stay: sinks, and those at the end that rings hold."""
        ring = self._ring_pages * self.page_size
        stays = (step.slots < self._sink_pages * self.page_size) | (step.slots >= step.kv_lens[:, None] - ring)
        return step.slots.masked_fill(~stays, -1)

    def commit(self, accepted: AcceptedNodes) -> None:
        starts, moves = self._accept(accepted)
        for layer in self.layers if moves else ():
            ops.commit_kv(layer.k, layer.v, accepted.nodes, starts, page_table=layer.page_table)

    def rollback(self, lengths: Sequence[int]) -> None:
        ring, sinks = self._ring_pages * self.page_size, self._sink_pages * self.page_size
        streams = not bool(self.full_heads.all())
        for b, (after, written) in enumerate(zip(lengths, self._written, strict=False)):
            lost = max(after - self.window + 1, sinks) + ring < written
            if streams and lost and 0 < after < self.lengths[b]:
                raise self._error(
                    "lengths", f"0 or at least {written - ring + self.window - 1} for sequence {b}, whose ring has "
                    "lost what came before", after,
                )  # fmt: skip
        self._shorten(lengths)
        self._written = [w if n else 0 for w, n in zip(self._written, lengths, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        lengths = self._reordered(rows)
        with torch.no_grad():
            for layer in self.layers:
                for x in (layer.k, layer.v):
                    pages = x[:, :, 0].unflatten(0, (self.batch_size, -1)) if self.batch_size else x
                    pages.copy_(pages[list(rows)])
        self._written = [self._written[r] for r in rows]
        self._set_lengths(lengths)

    def reset(self) -> None:
        self._set_lengths([0] * self.batch_size)
        self._written = [0] * self.batch_size


class DuoKVCache(StreamingKVCache):
    """DuoAttention's cache: all tokens for the retrieval heads that ``full_heads`` bool [layers, G] names, sinks and
    recent tokens for the others; one attention call a layer reads both."""

    def __init__(self, *sizes: int, full_heads: Tensor, **options: Any) -> None:
        super().__init__(*sizes, full_heads=full_heads, **options)
