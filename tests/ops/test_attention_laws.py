"""Laws that relate one call of ``attention`` to another: most hold bit for bit, the rest within both calls' bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import cpu_only
from effops import ops
from effops.reference.bounds import attention_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.attention import dense, hide_poison
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32, normal, same_bits
from torch import Tensor

pytestmark = [pytest.mark.core, pytest.mark.attention]

Result = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Result:
    return ops.attention(q, k, v, return_lse=True, **options)


def same(a: Result, b: Result) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def near(a: Result, b: Result, *args: Tensor, **options: Any) -> bool:
    """Both are results of one mathematical problem, stated by the arguments: at most two bounds apart."""
    bounds = attention_bound(*args, **options)
    return all(x.shape == y.shape and bound._replace(value=y.double()).worst(x) <= 2
               for bound, x, y in zip(bounds, a, b, strict=True))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_memory_layout_does_not_matter(dtype, data):
    case = data.draw(dense(DTYPES[dtype], kinds=("normal", "spikes")))
    plain = attend(*(x.clone(memory_format=torch.contiguous_format) for x in case.tensors), **case.options)
    assert same(attend(*case.tensors, **case.options), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_batch_composition_does_not_matter(dtype, data):
    """Each sequence alone, and the batch in another order."""
    case = data.draw(dense(DTYPES[dtype], kinds=("spikes",)))
    per_sequence = ("kv_lens", "kv_starts", "prefix_lens")

    def chosen(rows: list[int]) -> Result:
        options = {n: x[rows] if n in per_sequence and x is not None else x for n, x in case.options.items()}
        return attend(*(x[rows] for x in case.tensors), **options)

    whole = attend(*case.tensors, **case.options)
    for rows in [*([b] for b in range(whole[0].shape[0])), list(range(whole[0].shape[0]))[::-1]]:
        assert same(chosen(rows), (whole[0][rows], whole[1][rows]))


@cpu_only("torch's threads take no part in device kernels")
@pytest.mark.parametrize("tokens", [1, 3, 20, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_does_not_matter(dtype, tokens):
    q = normal(2, tokens, 6, 32, dtype=DTYPES[dtype])
    k, v = (normal(2, 4200, 2, d, dtype=q.dtype, seed=d) for d in (32, 16))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attend(q, k, v, causal=True, kv_lens=int32(4200, 1500)))
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_heads_of_different_kv_heads_do_not_meet(dtype, data):
    """Permuted KV heads with their query heads give permuted results; each KV head alone gives its part; and
    ``head_windows`` is each KV head's call with that window."""
    case = data.draw(dense(DTYPES[dtype], kinds=("spikes",)))
    q, k, v = case.tensors
    group = q.shape[2] // k.shape[2]
    windows = case.options.pop("head_windows", None)
    whole = attend(q, k, v, head_windows=windows, **case.options)

    def chosen(heads: list[int]) -> Result:
        queries = [h * group + i for h in heads for i in range(group)]
        options = dict(case.options)
        if windows is not None and len(heads) == 1:
            options["window"] = int(windows[heads[0]])
        elif windows is not None:
            options["head_windows"] = windows[heads]
        if "sink_logits" in options:
            options["sink_logits"] = options["sink_logits"][queries]
        got = attend(q[:, :, queries], k[:, :, heads], v[:, :, heads], **options)
        assert same(got, (whole[0][:, :, queries], whole[1][:, :, queries]))
        return got

    for heads in [*([g] for g in range(k.shape[2])), list(range(k.shape[2]))[::-1]]:
        chosen(heads)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_options_that_change_nothing(dtype, data):
    case = data.draw(dense(DTYPES[dtype], kinds=("spikes",)))
    q, k, v = case.tensors
    batch, capacity = k.shape[:2]
    everything = torch.full((batch,), capacity, dtype=torch.int32)
    plain = attend(*case.tensors, **case.options)
    if not case.options.get("window") and "head_windows" not in case.options:
        far = q.shape[1] + capacity
        assert same(attend(q, k, v, **{**case.options, "window": far}), plain)
        assert same(attend(q, k, v, **{**case.options, "num_sinks": 5}), plain)
        wide = torch.full((k.shape[2],), far, dtype=torch.int32)
        assert same(attend(q, k, v, **{**case.options, "head_windows": wide}), plain)
    full = attend(q, k, v, **{**case.options, "causal": False, "prefix_lens": None})
    assert same(attend(q, k, v, **{**case.options, "causal": True, "prefix_lens": everything}), full)
    lens = case.options["kv_lens"]
    longest = capacity if lens is None else max(lens.tolist(), default=0)
    assert same(attend(q, k, v, **{**case.options, "max_kv_len": longest}), plain)
    if case.options["kv_lens"] is None:
        assert same(attend(q, k, v, **{**case.options, "kv_lens": everything}), plain)
    if case.options["kv_starts"] is None:
        assert same(attend(q, k, v, **{**case.options, "kv_starts": 0 * everything}), plain)


@pytest.mark.parametrize("tokens", [1, 4, 30])
@pytest.mark.parametrize("place", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_kv_starts_shift(dtype, place, tokens):
    """Keys below kv_starts do not exist: cutting them off gives the same bits, with every mask."""
    q = normal(3, tokens, 4, 48, dtype=DTYPES[dtype])
    k, v = (LAYOUTS[place](normal(3, 200, 2, d, dtype=q.dtype, seed=d)) for d in (48, 40))
    starts, lens = [0, 65, 190], [200, 180, 195]
    hide_poison(k, v, int32(*lens), int32(*starts))
    masks = [{}, {"window": 37, "num_sinks": 9}, {"head_windows": int32(0, 20), "num_sinks": 2}, {"prefix_lens": 6}]
    for options in masks:
        prefix = {"prefix_lens": int32(6, 6, 6)} if options.pop("prefix_lens", None) else {}
        got = attend(q, k, v, causal=True, kv_lens=int32(*lens), kv_starts=int32(*starts), **options, **prefix)
        for b, (start, end) in enumerate(zip(starts, lens, strict=True)):
            cut = (x[b : b + 1, start:end] for x in (k, v))
            alone = attend(q[b : b + 1], *cut, causal=True, **options, **{n: x[:1] for n, x in prefix.items()})
            assert same(alone, (got[0][b : b + 1], got[1][b : b + 1]))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])  # float16 loses bits of small outputs
def test_powers_of_two_move_freely(dtype, tokens):
    q = normal(1, tokens, 3, 40, dtype=DTYPES[dtype])
    k, v = (normal(1, 300, 1, d, dtype=q.dtype, seed=d) for d in (40, 24))
    plain = attend(q, k, v, scale=0.25, causal=True)
    assert same(attend(2 * q, k, v, scale=0.125, causal=True), plain)
    assert same(attend(q, 2 * k, v, scale=0.125, causal=True), plain)
    assert same_bits(ops.attention(q, k, 4 * v, scale=0.25, causal=True), 4 * plain[0])
    assert same_bits(ops.attention(q, k, -v, scale=0.25, causal=True), -plain[0])
    assert same(attend(-q, k, v, scale=-0.25, causal=True), plain)


@pytest.mark.parametrize("tokens", [1, 2, 6, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_both_bounds(dtype, tokens):
    q = normal(2, tokens, 6, 40, dtype=DTYPES[dtype])
    k, v = (normal(2, 300, 2, d, dtype=q.dtype, seed=d) for d in (40, 24))
    plain = attend(q, k, v)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert near(attend(q, k[:, order], v[:, order]), plain, q, k, v), "keys have no order without a mask"
    repeated = (x.repeat_interleave(3, 2) for x in (k, v))
    assert near(attend(q, *repeated), plain, q, k, v), "GQA is repeated KV heads"
    one_by_one = [
        attend(q[:, i : i + 1], k, v, kv_lens=torch.full((2,), 300 - tokens + i + 1, dtype=torch.int32), causal=True)
        for i in range(tokens)
    ]
    joined = tuple(torch.cat(x, 1) for x in zip(*one_by_one, strict=True))
    assert near(joined, attend(q, k, v, causal=True), q, k, v, causal=True), "prefill is decoding token by token"


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_softcap_far_above_the_scores_is_none(tokens):
    q, k, v = normal(1, tokens, 2, 32), normal(1, 90, 1, 32), normal(1, 90, 1, 16)
    for got, expected in zip(attend(q, k, v, softcap=1e4), attend(q, k, v), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_logit_is_a_key_without_a_value(dtype, tokens):
    """One more dimension carries the sink's logit, one more key has it and the value 0."""
    logits = torch.tensor([0.0, 3.0, -2.0, 8.0])
    q, k, v = (normal(2, n, h, 32, dtype=DTYPES[dtype], seed=n) for n, h in ((tokens, 4), (70, 2), (70, 2)))
    with_sink = torch.cat([q, logits[None, None, :, None].expand(2, tokens, 4, 1).to(q.dtype)], -1)
    keys = torch.nn.functional.pad(k, (0, 1, 0, 0, 1, 0))
    keys[:, 0, :, 32] = 4.0
    as_key = attend(with_sink, keys, torch.nn.functional.pad(v, (0, 0, 0, 0, 1, 0)), scale=0.25)
    got = attend(q, k, v, scale=0.25, sink_logits=logits)
    assert near(got, as_key, q, k, v, scale=0.25, sink_logits=logits)


@pytest.mark.parametrize("tokens", [1, 3, 6, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_belongs(dtype, tokens):
    """NaN in a query reaches its own row, in a key the rows of its heads that see it, in a value one column of them;
    there it arrives, and every other bit is as it was."""
    q = normal(2, tokens, 6, 40, dtype=DTYPES[dtype])
    k, v = (normal(2, 150, 2, d, dtype=q.dtype, seed=d) for d in (40, 33))
    plain = attend(q, k, v, causal=True)

    def check(where: tuple[Any, ...], *poisoned: Tensor, lse_too: bool = True) -> None:
        out, lse = attend(*poisoned, causal=True)
        assert out[where].isnan().all() and lse[where[:3]].isnan().all() == lse_too
        clean, clean_lse = plain[0].clone(), plain[1].clone()
        clean[where], out[where] = 0, 0
        if lse_too:
            clean_lse[where[:3]], lse[where[:3]] = 0, 0
        assert same((out, lse), (clean, clean_lse))

    def with_nan(x: Tensor, *at: int) -> Tensor:
        x = x.clone()
        x[at] = torch.nan
        return x

    last = tokens - 1
    check((1, last, 4), with_nan(q, 1, last, 4, 7), k, v)
    check((0, slice(None), slice(3, 6)), q, with_nan(k, 0, 70, 1, 39), v)
    check((1, slice(last, None), slice(0, 3)), q, with_nan(k, 1, 149, 0, 0), v)
    check((0, slice(None), slice(3, 6), 32), q, k, with_nan(v, 0, 64, 1, 32), lse_too=False)
