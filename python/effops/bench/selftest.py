"""Seeded cases of every op against the exact result, each within its derived bound (:mod:`effops.reference.bounds`).

A case returns its worst ratio of error to bound: up to 1 is right. Checks of equality return 0 or infinity.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effops import ops, reference
from effops.ops.merging import Merging
from effops.reference import bounds
from effops.reference.bounds import Interval
from effops.reference.eviction_bounds import accumulate_mass_bound
from effops.reference.gradient_bounds import attention_gradient_bound
from effops.reference.merging_bounds import merge_kv_bound, similarity_bound
from effops.reference.moe_bounds import (
    fused_experts_bound,
    grouped_mm_bound,
    grouped_mm_weight_gradient_bound,
    moe_unpermute_bound,
    routing_is_right,
    topk_routing_bound,
)
from effops.reference.sampling_bounds import sample_bound, sampling_probs_bound

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One check: ``run()`` is the worst ratio of error to bound."""

    op: str
    name: str
    run: Callable[[], float]


def cases() -> Iterator[Case]:
    """All cases, in a fixed order; inputs are drawn from each case's own seed when it runs."""
    for name, dtype in DTYPES.items():
        for family in FAMILIES:
            for case in family(dtype):
                yield Case(case.op, f"{name} {case.name}", case.run)
    yield from _tree_cases()


class _Draw:
    """Seeded inputs of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def cache(self, batch: int, tokens: int, heads: int, dim: int) -> Tensor:
        """A [B,L,G,D] view of heads-major memory."""
        return self(batch, heads, tokens, dim).transpose(1, 2)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _equal(got: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(got, expected) else math.inf


def _worst(intervals: Any, results: Any) -> float:
    return max(interval.worst(got) for interval, got in zip(intervals, results, strict=True))


# name: (T, L, H, G, D, Dv), options
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one query, one key": ((1, 1, 2, 1, 16, 16), {}),
    "decode": ((1, 257, 4, 4, 64, 64), {}),
    "decode, 4 heads a KV head": ((1, 1300, 8, 2, 128, 128), {}),
    "decode, 3 heads a KV head, odd dims": ((1, 77, 6, 2, 33, 17), {"causal": True}),
    "8 heads on one KV head": ((2, 200, 8, 1, 64, 48), {"causal": True}),
    "lengths 0, 5, 70": ((3, 70, 4, 2, 32, 32), {"kv_lens": (0, 5, 70), "causal": True}),
    "more queries than keys": ((9, 4, 2, 1, 16, 16), {"causal": True}),
    "left padding": ((4, 90, 4, 2, 40, 40), {"kv_starts": (0, 20, 88), "causal": True}),
    "window": ((5, 300, 4, 2, 64, 64), {"causal": True, "window": 37}),
    "window and sinks": ((1, 300, 4, 2, 64, 64), {"causal": True, "window": 37, "num_sinks": 5}),
    "head windows": ((3, 200, 4, 2, 64, 64), {"causal": True, "head_windows": (0, 21), "num_sinks": 2}),
    "prefix": ((30, 40, 4, 2, 32, 32), {"causal": True, "prefix_lens": (0, 15, 40)}),
    "sink logits": ((2, 50, 4, 2, 32, 32), {"causal": True, "sink_logits": (0.5, -3.0, 8.0, 0.0)}),
    "softcap and scale": ((4, 60, 4, 2, 32, 32), {"softcap": 5.0, "scale": 0.3}),
    "prefill": ((70, 70, 6, 2, 64, 64), {"causal": True}),
    "windowed prefill": ((50, 130, 4, 2, 80, 72), {"causal": True, "window": 33, "kv_lens": (130, 64, 50)}),
    "long prefill against a cache": ((40, 1100, 4, 1, 128, 128), {"causal": True, "num_sinks": 3, "window": 700}),
    "no keys": ((2, 0, 2, 2, 16, 16), {}),
    "no queries": ((0, 5, 2, 2, 16, 16), {}),
}  # fmt: skip

GRADIENTS = (
    "decode, 3 heads a KV head, odd dims",
    "lengths 0, 5, 70",
    "window and sinks",
    "sink logits",
    "softcap and scale",
    "prefill",
)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.tensor(x) if name == "sink_logits" else _int32(*x) if isinstance(x, tuple) else x
        for name, x in options.items()
    }


def _attention_inputs(seed: int, dtype: torch.dtype, sizes: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
    """Batches of 3; keys outside [kv_start, kv_len) hold NaN, for they must not be read."""
    tokens, length, heads, kv_heads, dim, v_dim = sizes
    draw = _Draw(seed, dtype)
    q = draw(3, tokens, heads, dim)
    k, v = draw.cache(3, length, kv_heads, dim), draw.cache(3, length, kv_heads, v_dim)
    for b, end in enumerate(options.get("kv_lens", ())):
        k[b, end:], v[b, end:] = math.nan, math.nan
    for b, start in enumerate(options.get("kv_starts", ())):
        k[b, :start], v[b, :start] = math.nan, math.nan
    return [q, k, v]


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    for seed, (name, (sizes, options)) in enumerate(ATTENTION.items()):

        def run(seed: int = seed, sizes: tuple[int, ...] = sizes, options: dict[str, Any] = options) -> float:
            q, k, v = _attention_inputs(seed, dtype, sizes, options)
            named = _options(options)
            got = ops.attention(q, k, v, return_lse=True, **named)
            return _worst(bounds.attention_bound(q, k, v, **named), got)

        yield Case("attention", name, run)


def _other_attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    def batch_composition() -> float:
        q, k, v = _attention_inputs(1, dtype, (2, 400, 4, 2, 64, 64), {})
        whole = ops.attention(q, k, v, causal=True)
        alone = [ops.attention(*(x[b : b + 1] for x in (q, k, v)), causal=True) for b in range(3)]
        return _equal(torch.cat(alone), whole)

    def thread_count() -> float:
        q, k, v = _attention_inputs(2, dtype, (1, 3000, 4, 2, 64, 64), {})
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(ops.attention(q, k, v))
        finally:
            torch.set_num_threads(before)
        return _equal(*results)

    def split_and_merge() -> float:
        """The merge of parts over split keys against the whole: each part is off by its bound, weighted as the
        merge does; their lse errors move the weights; the merge adds its own error."""
        q, k, v = _attention_inputs(3, dtype, (2, 300, 4, 2, 64, 48), {})
        cuts = [slice(0, 100), slice(100, 100), slice(100, 300)]
        exact = [bounds.attention_bound(q, k[:, c], v[:, c]) for c in cuts]
        parts = [ops.attention(q, k[:, c], v[:, c], return_lse=True) for c in cuts]
        outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
        whole, whole_lse = bounds.attention_bound(q, k, v)
        own, own_lse = bounds.merge_states_bound(outs, lses)
        lse_error = torch.stack([lse.error for _, lse in exact]).amax(0)
        weights = torch.stack([lse.value for _, lse in exact])
        off = reference.merge_states(torch.stack([out.error for out, _ in exact]), weights)[0]
        size = reference.merge_states(outs.double().abs(), weights)[0]
        error = off + torch.expm1(2 * lse_error)[..., None] * size + own.error
        intervals = bounds.Interval(whole.value, error), bounds.Interval(whole_lse.value, lse_error + own_lse.error)
        return _worst(intervals, ops.merge_states(outs, lses))

    def merge() -> float:
        draw = _Draw(4, dtype)
        outs, lses = (
            draw(6, 5, 3, 33),
            8 * _Draw(5, torch.float64 if dtype == torch.float64 else torch.float32)(6, 5, 3),
        )
        lses[2], lses[:, 1] = -torch.inf, -torch.inf
        return _worst(bounds.merge_states_bound(outs, lses), ops.merge_states(outs, lses))

    def ragged() -> float:
        draw = _Draw(6, dtype)
        q, k, v = draw(40, 4, 48), draw(260, 2, 48), draw(260, 2, 32)
        cu_q, cu_k = _int32(0, 1, 1, 4, 37), _int32(0, 0, 50, 200, 251)  # rows 37.. belong to no sequence
        options: dict[str, Any] = {"causal": True, "window": 60, "num_sinks": 2}
        got = ops.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        return _worst(bounds.varlen_attention_bound(q, k, v, cu_q, cu_k, **options), got)

    def paged(page: int) -> float:
        """The bits of the dense op, from pages in another order."""
        draw, entries = _Draw(page, dtype), -(-200 // page)
        k_pages, v_pages = (draw(2 * entries, page, 2, dim) for dim in (48, 32))
        table = torch.randperm(2 * entries, generator=draw.generator).int().view(2, entries)
        k, v = (x[table.long()].flatten(1, 2) for x in (k_pages, v_pages))
        lens, q = _int32(200, 77), draw(2, 3, 4, 48)
        got = ops.paged_attention(q, k_pages, v_pages, table, lens, causal=True, window=90)
        return _equal(got, ops.attention(q, k, v, kv_lens=lens, causal=True, window=90))

    def tree(nodes: int) -> float:
        draw = _Draw(nodes, dtype)
        q, k, v = draw(2, nodes, 4, 48), draw.cache(2, 150, 2, 48), draw.cache(2, 150, 2, 32)
        ancestors = torch.randint(-(2**63), 2**63 - 1, (2, nodes, -(-nodes // 64)), generator=draw.generator)
        options: dict[str, Any] = {"kv_lens": _int32(150, 90), "window": 60, "num_sinks": 2}
        got = ops.tree_attention(q, k, v, ancestors, return_lse=True, **options)
        return _worst(bounds.tree_attention_bound(q, k, v, ancestors, **options), got)

    def sparse(lists: int) -> float:
        draw = _Draw(lists, dtype)
        q, k, v = draw(2, 1, 4, 48), draw.cache(2, 150, 2, 48), draw.cache(2, 150, 2, 32)
        indices = torch.randint(-1, 150, (2, lists, 70), generator=draw.generator, dtype=torch.int32)
        got = ops.sparse_attention(q, k, v, indices, return_lse=True, softcap=4.0)
        return _worst(bounds.sparse_attention_bound(q, k, v, indices, softcap=4.0), got)

    def cascade(causal: bool) -> float:
        draw = _Draw(9, dtype)
        shapes = ((1, 900, _int32(900), _int32(0, 12)), (4, 70, _int32(70, 3, 64, 9), _int32(0, 3, 6, 9, 12)))
        levels = [ops.KVLevel(draw(g, n, 2, 48), draw(g, n, 2, 32), lens, rows) for g, n, lens, rows in shapes]
        q = draw(12, 4, 48)
        options: dict[str, Any] = {"causal": causal, "softcap": 4.0}
        got = ops.cascade_attention(q, levels, return_lse=True, **options)
        return _worst(bounds.cascade_attention_bound(q, levels, **options), got)

    def mass(tokens: int) -> float:
        draw = _Draw(tokens, dtype)
        q, k = draw(2, tokens, 6, 48), draw.cache(2, 150, 2, 48)
        options: dict[str, Any] = {"causal": True, "kv_lens": _int32(150, 90)}
        _, lse = ops.attention(q, k, k, return_lse=True, **options)
        held = torch.ones(2, 2, 150, dtype=lse.dtype)
        bound = accumulate_mass_bound(held, q, k, lse, **options)
        ops.accumulate_mass(held, q, k, lse, **options)
        return bound.worst(held)

    for tokens in (1, 5, 70):
        yield Case("accumulate_mass", f"{tokens} tokens over 150 and 90 keys", partial(mass, tokens))
    for page in (5, 16, 64):
        yield Case("paged_attention", f"pages of {page}, the bits of the dense op", partial(paged, page))
    for nodes in (1, 6, 70):
        yield Case("tree_attention", f"{nodes} nodes, any mask", partial(tree, nodes))
    for lists, whose in ((1, "all heads"), (2, "each KV head"), (4, "each query head")):
        yield Case("sparse_attention", f"lists for {whose}", partial(sparse, lists))
    for causal in (False, True):
        name = f"a shared prefix and own keys{', causal' if causal else ''}"
        yield Case("cascade_attention", name, partial(cascade, causal))
    yield Case("attention", "bitwise the same alone and in a batch", batch_composition)
    yield Case("attention", "bitwise the same on 1 and 3 threads", thread_count)
    yield Case("merge_states", "split and merge is the whole", split_and_merge)
    yield Case("merge_states", "6 parts, some empty", merge)
    yield Case("varlen_attention", "lengths 0 to 150", ragged)


def _cache_cases(dtype: torch.dtype) -> Iterator[Case]:
    n, h = 300, 3

    def append() -> float:
        draw = _Draw(7, dtype)
        k_cache, v_cache = draw.cache(2, 9, 2, 33), draw.cache(2, 9, 2, 17)
        k_expected, v_expected = k_cache.clone(), v_cache.clone()
        k, v = draw(2, 3, 2, 33), draw(2, 3, 2, 17)
        slots = torch.tensor([[8, -1, 0], [2, 3, 4]], dtype=torch.int32)
        ops.append_kv(k_cache, v_cache, k, v, slots)
        reference.append_kv(k_expected, v_expected, k, v, slots)
        return max(_equal(k_cache, k_expected), _equal(v_cache, v_expected))

    def commit() -> float:
        draw = _Draw(10, dtype)
        k, v = draw.cache(2, 9, 2, 33), draw.cache(2, 9, 2, 17)
        k_expected, v_expected = k.clone(), v.clone()
        nodes = torch.tensor([[0, 2, 5], [1, 3, -1]], dtype=torch.int32)
        ops.commit_kv(k, v, nodes, _int32(3, 0))
        reference.commit_kv(k_expected, v_expected, nodes, _int32(3, 0))
        return max(_equal(k, k_expected), _equal(v, v_expected))

    def turn_and_append() -> float:
        """The bits of rotary and append_kv."""
        draw = _Draw(8, dtype)
        k, v, k_expected, v_expected = (torch.zeros(2, 9, 2, 34, dtype=dtype) for _ in range(4))
        qkv, angles = draw(2, 3, 7, 34), _Draw(9, torch.float32)(50, 16)
        positions = torch.tensor([[8, 0, 49], [2, 3, 4]], dtype=torch.int32)
        slots = torch.tensor([[8, -1, 0], [2, 3, 4]], dtype=torch.int32)
        q = ops.rotary_append(qkv, angles.cos(), angles.sin(), positions, k, v, slots)
        turned = ops.rotary(qkv, angles.cos(), angles.sin(), positions)
        ops.append_kv(k_expected, v_expected, turned[:, :, 3:5], qkv[:, :, 5:], slots)
        return max(_equal(q, turned[:, :, :3]), _equal(k, k_expected), _equal(v, v_expected))

    def labels(bits: int) -> float:
        """Bits and tokens of the reference; numbers are small integers, whose scores are exact."""
        draw = _Draw(bits, dtype)
        k, q = (4 * draw(2, n, h, 16)).round(), (4 * draw(2, 1, 6, 16)).round() if bits == 0 else draw(2, 1, 6, 16)
        channels = torch.randint(0, 16, (3, 10), generator=draw.generator, dtype=torch.int32)
        own = torch.int32 if bits else torch.float32
        got, expected = (torch.zeros(2, n, 3, 10 * bits // 32 + 1 if bits else 10, dtype=own) for _ in range(2))
        slots = torch.randperm(n, generator=draw.generator).int().expand(2, n)
        ops.append_labels(got, k, slots, channels, bits=bits)
        reference.append_labels(expected, k, slots, channels, bits=bits)
        options: dict[str, Any] = {"num_sinks": 2, "window": 3, "kv_lens": _int32(n, 31), "bits": bits}
        tokens = [f(q, expected, channels, 40, **options) for f in (ops.label_topk, reference.label_topk)]
        return max(_equal(got, expected), _equal(*tokens))

    def pages() -> float:
        """Bits and tokens of the reference; a page is begun anew."""
        draw = _Draw(14, dtype)
        k, q = draw(2, n, 3, 40), draw(2, 1, 6, 40)
        got, expected = ([torch.zeros(2, -(-n // 4), 3, 40, dtype=dtype) for _ in range(2)] for _ in range(2))
        slots = torch.arange(n, dtype=torch.int32).expand(2, n)
        for append, (low, high) in ((ops.append_page_bounds, got), (reference.append_page_bounds, expected)):
            append(low, high, k.flip(1), slots, 4)
            append(low, high, k[:, : n // 2], slots[:, : n // 2], 4)
        options: dict[str, Any] = {"num_sinks": 2, "window": 3, "kv_lens": _int32(n, 31)}
        tokens = [f(q, expected[0], expected[1], 6, 4, **options) for f in (ops.page_topk, reference.page_topk)]
        return max(*(_equal(a, b) for a, b in zip(got, expected, strict=True)), _equal(*tokens))

    def evict() -> float:
        """Bits of the reference: masses of few values, so that many are equal."""
        draw = _Draw(13, dtype)
        held = [draw.cache(2, 40, 2, 33), draw.cache(2, 40, 2, 17)]
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        held.append(torch.randint(0, 5, (2, 2, 40), generator=draw.generator).to(kept))
        order = [torch.randperm(40, generator=draw.generator) for _ in range(4)]
        held.append(torch.stack(order).int().view(2, 2, 40))
        expected = [x.clone() for x in held]
        k, v, new = draw(2, 3, 2, 33), draw(2, 3, 2, 17), _int32(40, 41, 42, -1, 40, 41).view(2, 3)
        ops.append_evicting(held[0], held[1], k, v, held[2], held[3], new, recent=5, num_sinks=2)
        reference.append_evicting(expected[0], expected[1], k, v, expected[2], expected[3], new, recent=5, num_sinks=2)
        return max(_equal(a, b) for a, b in zip(held, expected, strict=True))

    def merge(mode: Merging) -> float:
        draw = _Draw(14, dtype)
        held = [draw.cache(2, 200, 2, 33), draw.cache(2, 200, 2, 17)]
        options: dict[str, Any] = {"merging": mode, "kv_lens": _int32(200, 150)}
        got, kept = [x.clone() for x in held], torch.arange(0, 150, 3, dtype=torch.int32).expand(2, 2, 50)
        merged = ops.merge_kv(got[0], got[1], kept, **options)
        ratios = [merge_kv_bound(x, kept, *merged, **options).worst(y[:, :50]) for x, y in zip(held, got, strict=True)]
        scores = similarity_bound(held[0][1:, :150])
        others = (torch.arange(150) % 3 != 0).nonzero().flatten()
        best = Interval(*(x[:, :, others][..., ::3].amax(-1) for x in scores))
        return max(*ratios, best.worst(merged.similarity[1:, :, others]))

    def banks() -> float:
        """Bits of the reference: two matrices of other lengths."""
        draw = _Draw(15, dtype)
        call = (draw(2, 3, 100), draw(2, 2, 4, 16, 32), 30, 16, 8)
        options: dict[str, Any] = {"rows": _int32(30, 17), "columns": _int32(100, 41), "channels": 2}
        return _equal(ops.pim_gemv(*call, **options), reference.pim_gemv(*call, **options))

    yield Case("pim_gemv", "two matrices of other lengths in banks of 32 values", banks)
    yield Case("append_evicting", "40 slots, many equal masses, one token skipped", evict)
    for mode in ("averaged", "pivotal", "weighted"):
        yield Case("merge_kv", f"50 entries kept of 200 and 150, {mode}", partial(merge, mode))
    for bits in (0, 4, 8):
        yield Case("label_topk", f"labels of {bits} bits" if bits else "labels that are numbers", partial(labels, bits))
    yield Case("page_topk", "pages of 4 tokens, a length inside a page", pages)
    yield Case("append_kv", "slots out of order, one skipped", append)
    yield Case("commit_kv", "overlapping moves", commit)
    yield Case("rotary_append", "3 + 2 + 2 heads, one token skipped", turn_and_append)


def _layer_cases(dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 2, 3, 8, 16, 17, 40):

        def linear(rows: int = rows) -> float:
            draw = _Draw(rows, dtype)
            x, w, b, r = draw(rows, 333), draw(75, 333), draw(75), draw(rows, 75)
            packed = w if dtype == torch.float64 else ops.pack_weight(w)  # float64 has no packed format
            full = bounds.packed_linear_bound(x, w, b, residual=r).worst(ops.packed_linear(x, w, b, residual=r))
            return max(full, bounds.packed_linear_bound(x, w).worst(ops.packed_linear(x, packed)))

        def prepared(rows: int = rows) -> float:
            draw = _Draw(rows, dtype)
            x, gated, w, norm = draw(rows, 333), draw(rows, 666), draw(75, 333), draw(333)
            normed = bounds.packed_linear_bound(x, w, norm=norm).worst(ops.packed_linear(x, w, norm=norm))
            return max(normed, bounds.packed_linear_bound(gated, w, gated=True).worst(
                ops.packed_linear(gated, w, gated=True)))  # fmt: skip

        def few_bits(rows: int = rows) -> float:
            draw = _Draw(rows, dtype)
            x, w = draw(rows, 336), draw(75, 336)
            forms = [ops.pack_weight(w, format, group_size=24) for format in ("int8", "int4", "fp8_e4m3")]
            return max(bounds.packed_linear_bound(x, f).worst(ops.packed_linear(x, f)) for f in forms)

        yield Case("packed_linear", f"{rows} rows", linear)
        if dtype != torch.float64:
            yield Case("packed_linear", f"{rows} rows, weights in few bits", few_bits)
        yield Case("packed_linear", f"{rows} rows, norm or gate before", prepared)

    def norm(rows: int, dim: int, offset: float) -> float:
        draw = _Draw(dim, dtype)
        x, w = draw(rows, dim), draw(dim)
        return bounds.rms_norm_bound(x, w, 1e-5, weight_offset=offset).worst(
            ops.rms_norm(x, w, 1e-5, weight_offset=offset)
        )

    def turn(dim: int, turned: int) -> float:
        draw = _Draw(dim, dtype)
        x, angles = draw(2, 5, 3, dim), _Draw(dim + 1, torch.float32)(50, turned // 2)
        positions = torch.randint(0, 50, (2, 5), generator=draw.generator, dtype=torch.int32)
        arguments = x, angles.cos(), angles.sin(), positions
        return bounds.rotary_bound(*arguments).worst(ops.rotary(*arguments))

    def gate(rows: int, dim: int) -> float:
        x = 4 * _Draw(dim, dtype)(rows, dim)
        return bounds.silu_mul_bound(x).worst(ops.silu_mul(x))

    def layer(tokens: int) -> float:
        """The bits of its parts."""
        draw, table = _Draw(tokens, dtype), _Draw(1, torch.float32)(64, 16)
        x, norm1, norm2 = draw(2, tokens, 48), draw(48), draw(48)
        qkv, o, up, down = draw(8 * 32, 48), draw(48, 4 * 32), draw(80, 48), draw(48, 40)
        k, v, k_parts, v_parts = (torch.zeros(2, 32, 2, 32, dtype=dtype) for _ in range(4))
        slots = torch.arange(tokens, dtype=torch.int32).expand(2, -1)
        lens, angles = torch.full((2,), tokens, dtype=torch.int32), (table.cos(), table.sin(), slots)
        got = ops.decoder_layer(x, norm1, qkv, None, o, None, norm2, up, None, down, None, *angles, k, v, slots, lens)
        heads = ops.packed_linear(x, qkv, norm=norm1).unflatten(2, (8, 32))
        q = ops.rotary_append(heads, *angles, k_parts, v_parts, slots)
        mixed = ops.attention(q, k_parts, v_parts, kv_lens=lens, causal=True)
        y = ops.packed_linear(mixed.flatten(2), o, residual=x)
        parts = ops.packed_linear(ops.packed_linear(y, up, norm=norm2), down, residual=y, gated=True)
        return max(_equal(got, parts), _equal(k, k_parts), _equal(v, v_parts))

    def decoder(tokens: int) -> float:
        """The bits of its ops."""
        draw, table = _Draw(tokens + 1, dtype), _Draw(1, torch.float32)(64, 16)
        norms, qkv, o, up, down = (
            [draw(*shape) for _ in range(3)] for shape in ((48,), (8 * 32, 48), (48, 4 * 32), (80, 48), (48, 40))
        )
        k, v, k_each, v_each = (torch.zeros(3, 2, 32, 2, 32, dtype=dtype) for _ in range(4))
        slots, embedding, lm_head = torch.arange(tokens, dtype=torch.int32).expand(2, -1), draw(9, 48), draw(70, 48)
        lens, angles = torch.full((2,), tokens, dtype=torch.int32), (table.cos(), table.sin(), slots)
        lists: Any = norms, qkv, [], o, [], norms, up, [], down, []
        said = torch.arange(2 * tokens).view(2, tokens) % 9
        call: Any = *lists, norms[0], lm_head, *angles, k, v, slots, lens, [0, 3, 0]
        hidden, logits = ops.decoder(*(said, embedding, *call))
        x = embedding[said]
        for i, window in enumerate((0, 3, 0)):
            own: Any = *(each[i] if each else None for each in lists), *angles, k_each[i], v_each[i], slots, lens
            x = ops.decoder_layer(*(x, *own, 1e-6, window))
        parts = (logits, ops.packed_linear(x, lm_head, norm=norms[0])), (k, k_each), (v, v_each)
        return max(bounds.rms_norm_bound(x, norms[0]).worst(hidden), *(_equal(a, b) for a, b in parts))

    for tokens in (1, 20):
        yield Case("decoder_layer", f"{tokens} tokens a sequence, the bits of its parts", partial(layer, tokens))
        yield Case("decoder", f"{tokens} tokens a sequence, the bits of its ops", partial(decoder, tokens))
    for rows, dim, offset in ((1, 1, 0.0), (7, 333, 0.0), (40, 1024, 1.0), (0, 8, 0.0)):
        yield Case("rms_norm", f"{rows} rows of {dim}", partial(norm, rows, dim, offset))
    for dim, turned in ((64, 64), (80, 22), (6, 2)):
        yield Case("rotary", f"{turned} of {dim} dims", partial(turn, dim, turned))
    for rows, dim in ((1, 2), (9, 666), (40, 2048), (0, 8)):
        yield Case("silu_mul", f"{rows} rows of {dim}", partial(gate, rows, dim))


FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "temperature 0": {"temperature": 0.0},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "all filters": {"temperature": 0.8, "top_k": 300, "top_p": 0.95, "min_p": 0.01},
}


def _sampling_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Beside the bounds, no token that a filter drops may have a probability or be drawn."""

    def law(options: dict[str, Any]) -> float:
        x = 3 * _Draw(11, dtype)(5, 3000)
        exact, kept = sampling_probs_bound(x, **options)
        got = ops.sampling_probs(x, **options)
        return math.inf if (got[~kept.possibly] != 0).any() else exact.worst(got)

    def draw(options: dict[str, Any]) -> float:
        """How far outside of its token's part of the sums a uniform lies."""
        x, u = 3 * _Draw(12, dtype)(16, 700), torch.linspace(0, 1, 17, dtype=torch.float64)[:-1]
        sums, kept = sample_bound(x, **options)
        drawn = ops.sample(x, u, **options)[:, None]
        value, error = (x.gather(1, drawn)[:, 0] for x in sums)
        before, before_error = (x.gather(1, (drawn - 1).clamp(min=0))[:, 0] * (drawn[:, 0] > 0) for x in sums)
        outside = torch.maximum((u - value).clamp(min=0) / error, (before - u).clamp(min=0) / before_error)
        return outside.nan_to_num(0.0).max().item() if kept.possibly.gather(1, drawn).all() else math.inf

    def draft() -> float:
        """Ties and all: every step of these whole numbers is exact."""
        x, root = _Draw(13, torch.float32)(3, 16).round().to(dtype), torch.tensor([2, 0, 4])
        turned = torch.eye(16, dtype=dtype).roll(1, 0).expand(2, -1, -1)
        bias, lm_head = torch.full((1, 2, 16), 64, dtype=dtype), torch.eye(16, dtype=dtype).repeat(3, 1)
        tree = torch.tensor([[0, 1, 1, 2], [0, 0, 5, 40]], dtype=torch.int32)
        call = x, root, *tree, 0 * turned[None], bias, turned, turned, lm_head[:5], lm_head
        return _equal(ops.medusa_draft(*call), reference.medusa_draft(*call))

    yield Case("medusa_draft", "3 sequences on one tree", draft)
    for name, options in FILTERS.items():
        yield Case("sampling_probs", f"5 rows of 3000, {name}", partial(law, options))
        yield Case("sample", f"16 rows of 700, {name}", partial(draw, options))


ROUTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "top 2 of the softmax": (2, {}),
    "top 8, not renormalised": (8, {"renormalize": False}),
    "8 sigmoids of 4 in 8 groups": (8, {"scoring": "sigmoid", "groups": 8, "topk_group": 4, "group_score": "top2",
                                        "scale": 2.5}),
}  # fmt: skip


def _expert_cases(dtype: torch.dtype) -> Iterator[Case]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.randint(-1, 5, (40, 3), generator=torch.Generator().manual_seed(14)).int()

    def route(k: int, options: dict[str, Any]) -> float:
        logits = 2 * _Draw(15, dtype)(70, 64)
        weights, chosen = ops.topk_routing(logits, k, **options)
        right = routing_is_right(logits, chosen, **options).all()
        return topk_routing_bound(logits, chosen, **options).worst(weights) if right else math.inf

    def there_and_back() -> float:
        x, weights = _Draw(16, dtype)(40, 75), _Draw(17, wide)(40, 3)
        xp, offsets, inverse = ops.moe_permute(x, ids, 5)
        expected = reference.moe_permute(x, ids, 5)
        same = max(_equal(a, b) for a, b in zip((xp, offsets, inverse), expected, strict=True))
        return max(same, moe_unpermute_bound(xp, weights, inverse).worst(ops.moe_unpermute(xp, weights, inverse)))

    def sort() -> float:
        return max(_equal(a, b) for a, b in zip(ops.moe_sort(ids, 5), reference.moe_sort(ids, 5), strict=True))

    def grouped(load: tuple[int, ...]) -> float:
        draw, ends = _Draw(18, dtype), torch.tensor(load).cumsum(0).int()
        x, w, b = draw(sum(load) + 1, 65), draw(len(load), 65, 47), draw(len(load), 47)
        return grouped_mm_bound(x, w, ends, bias=b).worst(ops.grouped_mm(x, w, ends, bias=b))

    def gradient(load: tuple[int, ...]) -> float:
        draw, ends = _Draw(19, dtype), torch.tensor(load).cumsum(0).int()
        x, dy = draw(sum(load) + 1, 65), draw(sum(load) + 1, 47)
        exact = grouped_mm_weight_gradient_bound(x, dy, ends)
        return exact.worst(ops.grouped_mm_weight_gradient(x, dy, ends))

    def fused(int8: bool) -> float:
        draw = _Draw(20, dtype)
        up, down = (draw(5, 96, 64) / 8).to(dtype), (draw(5, 64, 48) / 7).to(dtype)
        call: dict[str, Any] = {"w_gate_up": up, "w_down": down}
        if int8:
            packed = [ops.pack_experts(w) for w in (up, down)]
            call = {"w_gate_up": packed[0].data, "w_down": packed[1].data, "scale_gate_up": packed[0].scale,
                    "scale_down": packed[1].scale}  # fmt: skip
        call |= {"weights": _Draw(21, wide)(40, 3).abs(), "ids": ids}
        x = draw(40, 64)
        return fused_experts_bound(x, **call).worst(ops.fused_experts(x, **call))

    for name, (k, options) in ROUTINGS.items():
        yield Case("topk_routing", name, partial(route, k, options))
    yield Case("moe_sort", "120 slots of 5 experts, some dropped", sort)
    yield Case("moe_permute", "there and back", there_and_back)
    if dtype == torch.float64 and os.environ.get("EFFOPS_BACKEND") == "simt":
        return  # products by expert in float64 are the CPU's
    loads = (3, 0, 1, 2), (0, 0, 60, 9)
    for op, case in (("grouped_mm", grouped), ("grouped_mm_weight_gradient", gradient)):
        for load in loads:
            yield Case(op, f"groups of {load}", partial(case, load))
    yield Case("fused_experts", "40 tokens, 3 of 5 experts", partial(fused, False))
    yield Case("fused_experts", "40 tokens, 3 of 5 experts in int8", partial(fused, True))


def _gradient_cases(dtype: torch.dtype) -> Iterator[Case]:
    def gradients(sizes: tuple[int, ...], options: dict[str, Any]) -> float:
        inputs, named = _attention_inputs(8, dtype, sizes, options), _options(options)
        leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", inputs, strict=True)}
        if "sink_logits" in named:
            leaves["sink_logits"] = named["sink_logits"].clone().requires_grad_()
        sinks = {name: x for name, x in leaves.items() if name not in "qkv"}
        out, lse = ops.attention(*list(leaves.values())[:3], return_lse=True, **{**named, **sinks})
        d_out = _Draw(9, dtype)(*out.shape)
        d_lse = _Draw(10, lse.dtype)(*lse.shape)
        got = torch.autograd.grad((out, lse), list(leaves.values()), (d_out, d_lse))
        rounded = os.environ.get("EFFOPS_BACKEND") == "simt"
        bounds = attention_gradient_bound(d_out, d_lse, *inputs, rounded_weights=rounded, **named)
        return _worst(bounds.values(), got)

    for name in GRADIENTS:
        yield Case("attention", f"gradient: {name}", partial(gradients, *ATTENTION[name]))


FAMILIES = (
    _attention_cases, _gradient_cases, _other_attention_cases, _cache_cases, _layer_cases, _sampling_cases,
    _expert_cases,
)  # fmt: skip


def _tree_cases() -> Iterator[Case]:
    """Equality with the rules. Their dtypes are fixed."""
    tree = torch.tensor([[-1, 0, 0, 1, 0, 2, 1, 3, 3, 4, -2, 9]], dtype=torch.int32)
    batch, nodes, vocab = 24, tree.shape[1], 75

    def worst(op: str, *arguments: Any, **options: Any) -> float:
        got, expected = (getattr(where, op)(*arguments, **options) for where in (ops, reference))
        return max(_equal(a, b) for a, b in zip(got, expected, strict=True))

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drafts from laws near the target's, and uniforms of which some accept."""
        draw = _Draw(seed, torch.float32)
        target = (3 * draw(batch, nodes, vocab)).softmax(-1)
        draft = (target.log() + draw(batch, nodes, vocab)).softmax(-1)
        drafts = torch.multinomial(draft.flatten(0, 1), 1, generator=draw.generator).view(batch, nodes)
        u = torch.rand(batch, nodes + 1, generator=draw.generator, dtype=torch.float64)
        return drafts, draft, target, u**2

    def greedy() -> float:
        drafts, _, target, _ = inputs(0)
        return worst("verify_greedy", tree, drafts, torch.where(drafts % 3 > 0, target.argmax(-1), drafts))

    def rejection(siblings: str) -> float:
        drafts, draft, target, u = inputs(1)
        laws = None if siblings == "deterministic" else draft
        return worst("verify_rejection", tree, drafts, laws, target, u, siblings=siblings)

    def typical(drawn: bool) -> float:
        drafts, _, target, u = inputs(2)
        return worst("verify_typical", tree, drafts, target, uniforms=u[:, 0] if drawn else None)

    chain = torch.arange(-1, 200, dtype=torch.int32)[None]
    yield Case("pack_ancestors", "int32 12 nodes, padding", partial(worst, "pack_ancestors", tree))
    yield Case("pack_ancestors", "int32 chain of 201", partial(worst, "pack_ancestors", chain))
    yield Case("verify_greedy", "int64 24 sequences on one tree", greedy)
    for siblings in ("iid", "without_replacement", "deterministic"):
        yield Case("verify_rejection", f"f32 siblings {siblings}", partial(rejection, siblings))
    for drawn in (False, True):
        yield Case("verify_typical", f"f32 next token {'drawn' if drawn else 'the likeliest'}", partial(typical, drawn))
