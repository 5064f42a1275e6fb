"""``append_labels`` and ``label_topk``: exact for labels of few bits, whose scores are integers; within the rounding of
float32 for labels that are numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS, embed, memory
from strategies.values import DTYPES, int32, normal, values
from torch import Tensor

pytestmark = pytest.mark.core

BITS = (0, 4, 8)
NUMBERS = {name: dtype for name, dtype in DTYPES.items() if name != "f64"}
KINDS = ("normal", "spikes", "tiny", "zeros")
PLACES = st.sampled_from([*LAYOUTS.values(), lambda x: embed(x, [0, 2, 3, 1], before=1, behind=3)])
STEP, EXP = 2.0**-24, 2.0**-126


def words_of(bits: int, channels: int) -> int:
    return -(-channels * bits // 32) if bits else channels


def some_channels(heads: int, channels: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randint(0, dim, (heads, channels), generator=torch.Generator().manual_seed(seed)).int()


def some_labels(*shape: int, bits: int, dtype: torch.dtype, seed: int = 0, kind: str = "normal") -> Tensor:
    """[B, L, G, words], any word being a label."""
    if bits == 0:
        return values(*shape, dtype=dtype, seed=seed, kind=kind)
    size = (*shape[:3], words_of(bits, shape[3]))
    words = torch.randint(-(2**31), 2**31, size, generator=torch.Generator().manual_seed(seed)).int()
    return words & 0x33333333 if kind == "tiny" else words * (kind != "zeros")  # few different ones: many ties


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_append(dtype, bits, data):
    """Against the reference, in all of the memory: other slots, words and gaps stay as they are."""
    batch, tokens, heads = (data.draw(st.integers(0, 3)) for _ in range(3))
    dim, channels, capacity = (data.draw(st.sampled_from(x)) for x in ((1, 5, 16), (0, 1, 3, 8, 9, 17), (1, 4, 9)))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(("normal", "spikes", "large", "zeros")))
    one = st.integers(-1, capacity - 1)
    slots = int32(*data.draw(st.lists(one, min_size=batch * tokens, max_size=batch * tokens))).view(batch, tokens)
    k = values(batch, tokens, heads, dim, dtype=DTYPES[dtype], seed=seed, kind=kind)
    if data.draw(st.booleans()) and k.numel():
        specials = (torch.inf, -torch.inf, *([torch.nan] if bits else []))  # which NaN a number becomes is not said
        k.view(-1)[seed % k.numel()] = data.draw(st.sampled_from(specials))
    options: dict[str, Any] = {"bits": bits}
    if data.draw(st.booleans()):
        options["offsets"] = normal(heads, channels, seed=1)
    if bits and data.draw(st.booleans()):
        options["scales"] = normal(heads, channels, seed=2) / 4
    own = torch.int32 if bits else data.draw(st.sampled_from(list(NUMBERS.values())))
    place, shape = data.draw(PLACES), (batch, capacity, heads, words_of(bits, channels))
    got, expected = (place(torch.full(shape, 77, dtype=own)) for _ in range(2))
    which = some_channels(heads, channels, dim, seed)
    ops.append_labels(got, data.draw(PLACES)(k), slots, which, **options)
    reference.append_labels(expected, k, slots, which, **options)
    assert torch.equal(memory(got), memory(expected))


@pytest.mark.parametrize("bits", (4, 8))
def test_labels_of_few_bits_are_near_the_keys(bits):
    """Half a step within range; the largest number beyond it."""
    k = normal(2, 30, 3, 16)
    channels = some_channels(3, 10, 16)
    scales, offsets = normal(3, 10, seed=1).abs() / 8 + 0.01, normal(3, 10, seed=2)
    labels = torch.zeros(2, 30, 3, words_of(bits, 10), dtype=torch.int32)
    slots = torch.arange(30, dtype=torch.int32).expand(2, 30)
    ops.append_labels(labels, k, slots, channels, scales=scales, offsets=offsets, bits=bits)
    x = (k.gather(-1, channels.long().expand(2, 30, 3, 10)) - offsets) / scales
    error = reference.labels.label_values(labels, 10, bits) - x.clamp(-(1 << bits - 1), (1 << bits - 1) - 1)
    assert error.abs().max() <= 0.5


def search(data: Any, dtype: torch.dtype, bits: int) -> tuple[tuple[Tensor, Tensor, Tensor, int], dict[str, Any]]:
    batch, heads, group = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dim, channels = data.draw(st.sampled_from((1, 8, 16))), data.draw(st.sampled_from((0, 1, 3, 8, 9, 16, 40)))
    capacity = data.draw(st.sampled_from((0, 1, 15, 16, 33, 64, 100, sized(700, 90), sized(2600, 130))))
    seed, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(KINDS))
    sinks, window = data.draw(st.sampled_from((0, 1, 4))), data.draw(st.sampled_from((0, 1, 8)))
    k = sinks + window + data.draw(st.sampled_from((0, 1, 7, 40, 200)))
    options: dict[str, Any] = {
        "num_sinks": sinks,
        "window": window,
        "bits": bits,
        "each_head": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        lens = [data.draw(st.integers(0, capacity)) for _ in range(batch)]
        options |= {"kv_lens": int32(*lens), "kv_starts": int32(*(data.draw(st.integers(0, n)) for n in lens))}
    if bits and data.draw(st.booleans()):
        options["scales"] = normal(heads, channels, seed=2)
    q = values(batch, 1, heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    number = data.draw(st.sampled_from(list(NUMBERS.values())))
    labels = some_labels(batch, capacity, heads, channels, bits=bits, dtype=number, seed=seed, kind=kind)
    return (q, labels, some_channels(heads, channels, dim, seed), k), options


def placed(data: Any, call: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    q, labels, channels, k = call
    return ops.label_topk(data.draw(PLACES)(q), data.draw(PLACES)(labels), channels, k, **options)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call_of_few_bits(dtype, bits, data):
    call, options = search(data, DTYPES[dtype], bits)
    assert torch.equal(placed(data, call, options), reference.label_topk(*call, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_call_of_numbers(dtype, data):
    """As many as there are; none of those left out is better than one that is taken, by more than both scores' sums
    of r products may be rounded."""
    call, options = search(data, DTYPES[dtype], 0)
    got, (q, labels, channels, _) = placed(data, call, options), call
    expected = reference.label_topk(*call, **options)
    assert torch.equal(got.ge(0).sum(-1), expected.ge(0).sum(-1))
    how = {"each_head": options["each_head"]}
    scores = reference.label_scores(q, labels, channels, **how)
    sizes = reference.label_scores(q.abs(), labels.abs(), channels, **how)
    error = (channels.shape[1] + 2) * (STEP * sizes + EXP)
    for b in range(got.shape[0]):
        end = int(options["kv_lens"][b]) if "kv_lens" in options else labels.shape[1]
        start = int(options["kv_starts"][b]) if "kv_starts" in options else 0
        first = min(end, start + options["num_sinks"])
        forced = {*range(start, first), *range(max(first, end - options["window"]), end)}
        for i in range(got.shape[1]):
            row = [j for j in got[b, i].tolist() if j >= 0]
            assert row == sorted(set(row)) and forced <= set(row) <= set(range(start, end))
            taken, left = sorted(set(row) - forced), sorted(set(range(start, end)) - set(row))
            if taken and left:
                low, high = scores[b, i, taken] + error[b, i, taken], scores[b, i, left] - error[b, i, left]
                assert low.min() >= high.max()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_exact_numbers(dtype):
    """Multiples of 1/4 have exact scores: ties, too, go to the lowest positions."""
    generator = torch.Generator().manual_seed(0)
    q, labels = (torch.randint(-8, 9, s, generator=generator) / 4 for s in ((2, 1, 6, 16), (2, sized(3000, 300), 3, 8)))
    channels = some_channels(3, 8, 16)
    call = q.to(DTYPES[dtype]), labels.to(DTYPES[dtype]), channels, 200
    for each_head in (False, True):
        assert torch.equal(ops.label_topk(*call, each_head=each_head), reference.label_topk(*call, each_head=each_head))


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_attention_scores(bits):
    """With all channels as labels a list has the tokens of the largest scores; few bits come near."""
    dim, tokens = 32, 1000
    q, k = normal(1, 1, 1, dim), normal(1, tokens, 1, dim, seed=1)
    channels = torch.arange(dim, dtype=torch.int32)[None]
    labels = torch.zeros(1, tokens, 1, words_of(bits, dim), dtype=torch.int32 if bits else torch.float32)
    scales = torch.full((1, dim), 3.5 / 2 ** (bits - 1)) if bits else None
    ops.append_labels(labels, k, torch.arange(tokens, dtype=torch.int32)[None], channels, scales=scales, bits=bits)
    got = ops.label_topk(q, labels, channels, 50, scales=scales, bits=bits)
    best = (k[0, :, 0] @ q[0, 0, 0]).topk(50).indices
    found = len(set(got.flatten().tolist()) & set(best.tolist()))
    assert found == 50 if bits == 0 else found >= (48 if bits == 8 else 40)


@pytest.mark.parametrize("order", ("drawn", "ascending", "descending", "one", "periodic"))
@pytest.mark.parametrize("tokens", (8191, 8192, sized(40001, 8200)))
@pytest.mark.parametrize("bits", (4, 8))
def test_many_tokens(bits, tokens, order):
    """So many that a sample tells where the last one taken is looked for: also where the sample is no likeness."""
    q, channels = normal(1, 1, 2, 8), torch.arange(8, dtype=torch.int32)[None]
    labels = some_labels(1, tokens, 1, 8, bits=bits, dtype=torch.float32)
    if order in ("ascending", "descending"):
        first = labels[..., :1] & 2**bits - 1
        labels = labels.gather(1, first.argsort(1, descending=order == "descending").expand_as(labels))
    elif order == "one":
        labels[:, 1:] = labels[:, :1].clone()
        labels[:, tokens // 2] ^= 0x33333333
    elif order == "periodic":  # the sample sees one label only
        labels[:, ::8] = labels[:, :1].clone()
    for k in (1, 20, tokens // 16, tokens - 1):
        got = ops.label_topk(q, labels, channels, k, bits=bits)
        assert torch.equal(got, reference.label_topk(q, labels, channels, k, bits=bits))


@pytest.mark.parametrize("bits", BITS)
def test_permuted_tokens_are_the_same_tokens(bits):
    q, labels = normal(2, 1, 4, 16), some_labels(2, 500, 2, 8, bits=bits, dtype=torch.float32)
    channels, order = some_channels(2, 8, 16), torch.randperm(500, generator=torch.Generator().manual_seed(3))
    moved = ops.label_topk(q, labels[:, order].contiguous(), channels, 30, bits=bits)
    plain = ops.label_topk(q, labels, channels, 30, bits=bits)
    scores = reference.label_scores(q, labels, channels, bits=bits).float()
    for b in range(2):
        for g in range(2):
            got = scores[b, g, order[moved[b, g].long()]].sort().values
            assert torch.equal(got, scores[b, g, plain[b, g].long()].sort().values)  # ties may be other tokens


@pytest.mark.parametrize("bits", BITS)
def test_a_sequence_alone_threads_and_lists(bits):
    """A sequence's list does not depend on others, nor on threads; one head's own list is that of a KV head alone."""
    q, labels = normal(3, 1, 4, 16), some_labels(3, sized(5000, 200), 4, 8, bits=bits, dtype=torch.bfloat16)
    channels = some_channels(4, 8, 16)
    got = ops.label_topk(q, labels, channels, 90, bits=bits)
    assert torch.equal(ops.label_topk(q, labels, channels, 90, bits=bits, each_head=True), got)
    for b in range(3):
        assert torch.equal(ops.label_topk(q[b : b + 1], labels[b : b + 1], channels, 90, bits=bits)[0], got[b])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.label_topk(q, labels, channels, 90, bits=bits), got)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", BITS)
def test_not_numbers(bits):
    """A query that is not finite gives some list of tokens that are there, without repetition."""
    q, labels = normal(1, 1, 2, 16), some_labels(1, 300, 1, 8, bits=bits, dtype=torch.float32)
    for value in (torch.nan, torch.inf, -torch.inf):
        q[0, 0, 1, 3] = value
        row = ops.label_topk(q, labels, torch.arange(8, dtype=torch.int32)[None], 40, bits=bits).flatten().tolist()
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 300 and len(row) == 40
