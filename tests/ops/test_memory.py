"""Offsets beyond 32 bits, memory that may not be read, results that are wholly written."""

from __future__ import annotations

import mmap

import pytest
import torch
from calls import CALLS, OPS, name_of, results, run
from effops import ops
from strategies.layouts import LAYOUTS
from strategies.values import int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core

FAR = 2**31 + 8


def far_apart(x: Tensor, dim: int, distance: int = FAR) -> Tensor:
    """x with neighbours in ``dim`` so many elements apart, in memory that the system maps as it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    elements = distance * (x.shape[dim] - 1) + x.numel()
    memory = mmap.mmap(-1, elements * x.element_size(), flags=flags)
    strides = list(x.contiguous().stride())
    strides[dim] = distance
    view = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides)
    return view.copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_over_2_to_the_31_elements(dtype, tokens, dim):
    q, k, v = (normal(2, n, h, 2, dtype=dtype, seed=n) for n, h in ((tokens, 4), (3, 2), (3, 2)))
    expected = ops.attention(q, k, v)
    for at in range(3):
        if at == 0 and dim == 1 and tokens == 20:
            continue  # 20 tokens so far apart are more address space than a process may have
        placed = [far_apart(x, dim) if i == at else x for i, x in enumerate((q, k, v))]
        assert same_bits(ops.attention(*placed), expected)
    if dim > 0:
        cu_q, cu_k = int32(0, tokens), int32(0, 3)
        ragged = ops.varlen_attention(q[0], far_apart(k[0], dim - 1), far_apart(v[0], dim - 1), cu_q, cu_k)
        assert same_bits(ragged, expected[0])


@pytest.mark.parametrize("tokens", [1, 20])
def test_later_tiles_beyond_2_to_the_31_elements(tokens):
    """Keys that are near enough for 32 bits in the first tile of 64 only."""
    q, k, v = (normal(1, n, 1, 4, dtype=torch.bfloat16, seed=n) for n in (tokens, 130, 131))
    placed = [far_apart(x, 1, FAR // 64) for x in (k, v[:, :130])]
    assert same_bits(ops.attention(q, *placed), ops.attention(q, k, v[:, :130]))
    d_out = normal(1, tokens, 1, 4, dtype=torch.bfloat16, seed=5)
    gradients = [
        torch.autograd.grad(ops.attention(q.clone().requires_grad_(), *x), x, d_out)
        for x in ([x.requires_grad_() for x in placed], [k.requires_grad_(), v[:, :130].clone().requires_grad_()])
    ]
    assert all(same_bits(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_cache_writes_over_2_to_the_31_elements(dim):
    caches = [far_apart(torch.zeros(2, 3, 2, d, dtype=torch.bfloat16), dim) for d in (2, 3)]
    k, v = (normal(2, 2, 2, d, dtype=torch.bfloat16) for d in (2, 3))
    ops.append_kv(*caches, k, v, int32(0, 2, 2, 1).view(2, 2))
    for cache, new in zip(caches, (k, v), strict=True):
        expected = torch.zeros(cache.shape, dtype=cache.dtype)
        expected[0, 0], expected[0, 2], expected[1, 2], expected[1, 1] = new[0, 0], new[0, 1], new[1, 0], new[1, 1]
        assert same_bits(cache, expected)
    positions = int32(7, 5, -1, 5, 6, 7, *range(6)).view(2, 2, 3)  # free, and of equal masses the oldest
    ops.append_evicting(
        *caches, k[:, :1], v[:, :1], torch.zeros(2, 2, 3), positions, int32(9, 9)[:, None], recent=1, num_sinks=0
    )
    for cache, new in zip(caches, (k, v), strict=True):
        assert same_bits(cache[[0, 0, 1, 1], [2, 0, 0, 0], [0, 1, 0, 1]], new[:, 0].flatten(0, 1))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_merging_over_2_to_the_31_elements(dim):
    caches, kept = [normal(2, 4, 2, d, dtype=torch.bfloat16, seed=d) for d in (2, 3)], int32(1, 3).expand(2, 2, 2)
    placed = [far_apart(x, dim) for x in caches]
    assert all(same_bits(a, b) for a, b in zip(ops.merge_kv(*placed, kept), ops.merge_kv(*caches, kept), strict=True))
    assert all(same_bits(a, b) for a, b in zip(placed, caches, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_page_bounds_over_2_to_the_31_elements(dim):
    k, q, slots = normal(2, 9, 2, 3), normal(2, 1, 4, 3, seed=1), torch.arange(9, dtype=torch.int32).expand(2, 9)
    near, far = [torch.zeros(2, 5, 2, 3) for _ in range(2)], [far_apart(torch.zeros(2, 5, 2, 3), dim) for _ in range(2)]
    ops.append_page_bounds(*near, k, slots, 2)
    ops.append_page_bounds(*far, far_apart(k, dim), slots, 2)
    assert all(same_bits(a, b) for a, b in zip(near, far, strict=True))
    expected = ops.page_topk(q, *near, 3, 2, window=1)
    assert same_bits(ops.page_topk(far_apart(q, dim), *far, 3, 2, window=1), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 20])
def test_pages_over_2_to_the_31_elements(tokens, dim):
    table, lens = int32(1, 0).view(1, 2), int32(20)
    q, k, v = (normal(n, t, h, 2, dtype=torch.bfloat16, seed=h) for n, t, h in ((1, tokens, 4), (2, 10, 2), (2, 10, 1)))
    v = v.repeat(1, 1, 2, 1)
    bits = torch.full((1, tokens, 1), -1)
    placed = [far_apart(x, dim, FAR if dim in (0, 2) else FAR // 8) for x in (k, v)]
    assert same_bits(ops.paged_attention(q, *placed, table, lens), ops.paged_attention(q, k, v, table, lens))
    trees = [ops.tree_attention(q, *x, bits, kv_lens=lens, page_table=table) for x in (placed, (k, v))]
    assert same_bits(*trees)
    if tokens == 1:
        lists = int32(0, 19, 12, 9, 3, -1).view(1, 2, 3)
        few = [ops.sparse_attention(q, *x, lists, kv_lens=lens, page_table=table) for x in (placed, (k, v))]
        assert same_bits(*few)
    masses = [torch.zeros(1, 2, 20) for _ in range(2)]
    for mass, (keys, _) in zip(masses, (placed, (k, v)), strict=True):
        ops.accumulate_mass(mass, q, keys, torch.zeros(1, tokens, 4), kv_lens=lens, page_table=table)
    assert masses[0].gt(0).all() and same_bits(*masses)
    nodes = int32(0, 2, 5)[None]
    for caches in (placed, (k, v)):
        ops.append_kv(*caches, q[:, :1, :2], q[:, :1, 2:], int32(12)[None], page_table=table)
        ops.commit_kv(*caches, nodes, int32(8), page_table=table)
    assert all(same_bits(a, b) for a, b in zip(placed, (k, v), strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_rotary_append_over_2_to_the_31_elements(dim):
    qkv, angles = normal(2, 2, 4, 2, dtype=torch.bfloat16), normal(5, 1)
    indices = int32(0, 2, 1, 0).view(2, 2)

    def call(qkv: Tensor, caches: list[Tensor]) -> list[Tensor]:
        return [ops.rotary_append(qkv, angles.cos(), angles.sin(), indices, *caches, indices), *caches]

    def zeros() -> list[Tensor]:
        return [torch.zeros(2, 3, 1 if dim != 2 else 2, 2, dtype=torch.bfloat16) for _ in range(2)]

    expected = call(qkv, zeros())
    for got in (call(far_apart(qkv, dim), zeros()), call(qkv, [far_apart(x, dim) for x in zeros()])):
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_over_2_to_the_31_elements(dtype):
    x, w = normal(3, 8, dtype=dtype), normal(4, 8, dtype=dtype, seed=1)
    tables, positions = normal(5, 2), int32(0, 1, 2, 3, 4, 4).view(2, 3)
    heads = normal(2, 3, 2, 8, dtype=dtype)
    assert same_bits(ops.packed_linear(far_apart(x, 0), far_apart(w, 0)), ops.packed_linear(x, w))
    assert same_bits(ops.rms_norm(far_apart(x, 0), w[0]), ops.rms_norm(x, w[0]))
    assert same_bits(ops.silu_mul(far_apart(x, 0)), ops.silu_mul(x))
    assert same_bits(ops.sampling_probs(far_apart(x, 0)), ops.sampling_probs(x))
    for dim in range(3):
        got = ops.rotary(far_apart(heads, dim), tables.cos(), tables.sin(), positions)
        assert same_bits(got, ops.rotary(heads, tables.cos(), tables.sin(), positions))


@pytest.mark.parametrize("name", ["pack_ancestors", "verify_greedy", "verify_rejection", "verify_typical"])
def test_trees_over_2_to_the_31_elements(name):
    op, call = getattr(torch.ops.effops, name).default, CALLS[name]()
    plain = run(op, call)
    for argument, x in call.items():
        for dim in range(x.dim() if isinstance(x, Tensor) else 0):
            placed = call | {argument: far_apart(x, dim, FAR if x.element_size() < 8 or dim == 0 else FAR // 2)}
            assert all(same_bits(a, b) for a, b in zip(run(op, placed), plain, strict=True))


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_nothing_is_read_past_the_end(op):
    """All arguments end at unreadable pages, at sizes around vectors and tiles."""
    plain = run(op, CALLS[name_of(op)]())
    call = {n: LAYOUTS["guarded"](x) if isinstance(x, Tensor) else x for n, x in CALLS[name_of(op)]().items()}
    assert all(same_bits(a, b) for a, b in zip(run(op, call), plain, strict=True))


@pytest.mark.attention
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unreadable_pages_behind_every_size(dtype):
    place = LAYOUTS["guarded"]
    for dim in (1, 3, 7, 8, 9, 15, 17, 31, 33, 47, 63, 64, 65, 100, 129):
        for keys in (1, 7, 63, 65, 130):
            k, v = place(normal(1, keys, 1, dim, dtype=dtype)), place(normal(1, keys, 1, 130 - dim, dtype=dtype))
            for tokens in (1, 2, 4, 18):
                assert ops.attention(place(normal(1, tokens, 1, dim, dtype=dtype)), k, v).isfinite().all()
        for rows in (1, 2, 3, 4):
            w, norm = place(normal(dim, 130 - dim, dtype=dtype)), place(normal(130 - dim, dtype=dtype))
            x, gated = (place(normal(rows, n * (130 - dim), dtype=dtype)) for n in (1, 2))
            assert ops.packed_linear(x, w).isfinite().all()
            assert ops.packed_linear(x, w, norm=norm).isfinite().all()
            assert ops.packed_linear(gated, w, gated=True).isfinite().all()
        x = place(normal(3, 2 * dim, dtype=dtype))
        assert ops.rms_norm(x, place(normal(2 * dim, dtype=dtype))).isfinite().all()
        assert ops.silu_mul(x).isfinite().all()
        for filters in ({}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.01}):
            assert ops.sampling_probs(x, **filters).isfinite().all()


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_results_are_new_and_contiguous(op):
    call = CALLS[name_of(op)]()
    inputs = {x.untyped_storage().data_ptr() for x in call.values() if isinstance(x, Tensor)}
    for x in results(op(**call)):
        assert x.is_contiguous() and x.isfinite().all()
        assert x.untyped_storage().data_ptr() not in inputs


def test_values_of_another_sign_bit():
    """torch marks lazily negated tensors; an op that ignores the mark reads them unnegated."""
    negative = torch.view_as_complex(normal(1, 5, 1, 8, 2)).conj().imag
    assert negative.is_neg()
    q = normal(1, 1, 1, 8, seed=1)
    assert same_bits(ops.attention(q, negative, negative), ops.attention(q, negative.clone(), negative.clone()))
