"""``sample`` and ``sampling_probs``: within bounds, exact where the arithmetic is, laws between calls, frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backend import NAME, sized
from effops import ops, reference
from effops.reference.sampling_bounds import sample_bound, sampling_probs_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.core

SHAPES = [(), (1,), (3,), (0,), (2, 5), (3, 1, 4), (2, 0, 3), (2, 3, 2, 2)]
SIZES = st.integers(1, 70) | st.sampled_from((255, 256, 257, 300, 1000, 3000))
KINDS = ("normal", "spikes", "large", "zeros", "rounded", "excluded")
PLACES = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)
FILTERS = {
    "none": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
}
EACH_FILTER = pytest.mark.parametrize("filters", FILTERS.values(), ids=list(FILTERS))


def logits_of(*shape: int, dtype: torch.dtype, seed: int = 0, kind: str = "normal") -> Tensor:
    """Also rounded ones, with many ties, and rows that exclude most of their tokens."""
    x = 3 * values(*shape, dtype=dtype, seed=seed, kind=kind if kind in ("spikes", "large", "zeros") else "normal")
    if kind == "rounded":
        x = x.round()
    if kind == "excluded":
        x[..., 1:] = x[..., 1:].masked_fill(normal(*x[..., 1:].shape, seed=seed + 1) > 0.2, -torch.inf)
    return x


def uniforms_of(*shape: int, seed: int = 0) -> Tensor:
    """With both ends of [0, 1) among them."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u.masked_fill(u < 0.1, 0.0).masked_fill(u > 0.9, math.nextafter(1.0, 0.0))


@st.composite
def filters(draw: st.DrawFn, size: int) -> dict[str, Any]:
    one = st.sampled_from
    return {
        "temperature": draw(one((1.0, 1.0, 0.0, 0.3, 2.5, 1e-3, 1e6))),
        "top_k": draw(one((0, 0, 1, 2, 5, 50, size - 1, size, size + 9, 10**15)) | st.integers(0, size)),
        "top_p": draw(one((1.0, 1.0, 0.5, 0.9, 0.999, 1e-9, 1 - 1e-9)) | st.floats(0.01, 1)),
        "min_p": draw(one((0.0, 0.0, 0.1, 1.0, 1e-6)) | st.floats(0, 1)),
    }


@DTYPE
@given(data=st.data())
def test_law_and_draw(dtype, data):
    """The law is within its bound; only tokens near an edge may be kept or dropped against it; a draw's part of the
    sums holds its uniform."""
    shape, size = data.draw(st.sampled_from(SHAPES)), data.draw(SIZES)
    named, kind = data.draw(filters(size)), data.draw(st.sampled_from(KINDS))
    x = data.draw(PLACES)(logits_of(*shape, size, dtype=DTYPES[dtype], seed=size, kind=kind))
    u = data.draw(PLACES)(uniforms_of(*shape, seed=size))
    law, kept = sampling_probs_bound(x, **named)
    got = ops.sampling_probs(x, **named)
    assert got.dtype == (torch.float64 if dtype == "f64" else torch.float32) and got.is_contiguous()
    assert law.worst(got) <= 1
    assert not (got[~kept.possibly] != 0).any()
    assert (got[kept.surely & (law.value > 1e-30)] > 0).all()

    tokens = ops.sample(x, u, **named)
    assert tokens.dtype == torch.int64 and tokens.shape == shape
    at = tokens[..., None]
    assert (got.gather(-1, at) > 0).all()
    if named["temperature"] > 0:
        sums = sample_bound(x, **named)[0]
        above, below = sums.value + sums.error, torch.nn.functional.pad(sums.value - sums.error, (1, 0))
        assert (u[..., None] <= above.gather(-1, at)).all() and (below.gather(-1, at) <= u[..., None]).all()
    else:
        assert torch.equal(tokens, x.argmax(-1))


@DTYPE
@pytest.mark.parametrize("size", [1, 2, 8, 64, 1024])
def test_equal_logits(dtype, size):
    """A power of two of them: probabilities and their sums are exact, and so are draws at their very edges."""
    x = torch.full((3 * size,), -2.5, dtype=DTYPES[dtype])
    x[::3] = -torch.inf
    x[1::3] = -torch.inf
    assert same_bits(ops.sampling_probs(x), torch.where(x.isinf(), 0.0, 1 / size).to(ops.sampling_probs(x).dtype))
    edges = torch.arange(size, dtype=torch.float64) / size
    drawn = ops.sample(x.expand(size, -1), edges)
    assert drawn.tolist() == list(range(2, 3 * size, 3))
    before = torch.nextafter(edges[1:], torch.zeros(1, dtype=torch.float64))
    assert ops.sample(x.expand(size - 1, -1), before).tolist() == drawn[:-1].tolist()
    assert ops.sample(x, torch.tensor(math.nextafter(1.0, 0.0), dtype=torch.float64)) == 3 * size - 1


@DTYPE
def test_ties_at_an_edge_go_to_the_lowest_id(dtype):
    x = torch.zeros(600, dtype=DTYPES[dtype])
    x[5], x[7::2] = 1, -0.0
    kept = {
        "top_k": (ops.sampling_probs(x, top_k=300), 300),
        "top_p": (ops.sampling_probs(x - 0 * x[5], top_p=0.25, temperature=1e6), 150),
        "both": (ops.sampling_probs(x, top_k=4, top_p=0.5), 2),
        "one": (ops.sampling_probs(x, top_p=1e-9), 1),
    }
    for name, (law, count) in kept.items():
        expected = sorted([5, *[i for i in range(600) if i != 5][: count - 1]])
        assert law.nonzero().flatten().tolist() == expected, name
    assert ops.sampling_probs(x, min_p=0.3).count_nonzero() == 600
    assert ops.sampling_probs(x, min_p=0.4).count_nonzero() == 1


@DTYPE
def test_rare_tokens_come_at_their_place(dtype):
    """A uniform below 2^-24 reaches a token that no float32 uniform could tell from the one before it."""
    x = torch.tensor([-20.0, 0.0, -18.0], dtype=DTYPES[dtype])
    p = ops.sampling_probs(x).double()
    u = torch.stack([p[0] * 0.5, p[0] * 1.5, 1 - p[2] * 1.5, 1 - p[2] * 0.5])
    assert ops.sample(x.expand(4, -1), u).tolist() == [0, 1, 1, 2]


@DTYPE
def test_rounding_never_draws_an_excluded_token(dtype):
    """Behind, before and between the others, with the largest uniform there is."""
    most = torch.tensor(math.nextafter(1.0, 0.0), dtype=torch.float64)
    for size in range(2, sized(80, 20)):
        for x in (normal(size, dtype=DTYPES[dtype], seed=size), torch.zeros(size, dtype=DTYPES[dtype])):
            x[-1], x[0] = -torch.inf, 0.5
            for named in FILTERS.values():
                law = ops.sampling_probs(x, **named)
                for u in (most, 0 * most):
                    assert law[ops.sample(x, u, **named)] > 0


@DTYPE
def test_options_that_change_nothing(dtype):
    x, u = logits_of(4, 700, dtype=DTYPES[dtype], kind="rounded"), uniforms_of(4)
    for name, named in FILTERS.items():
        if name in ("top_k", "all"):
            continue
        for same in ({"top_k": 700}, {"top_k": 10**9}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}):
            extended = same | named
            assert same_bits(ops.sampling_probs(x, **extended), ops.sampling_probs(x, **named))
            assert same_bits(ops.sample(x, u, **extended), ops.sample(x, u, **named))


@DTYPE
def test_greedy(dtype):
    """Temperature 0 and top_k 1 are the first of equal maxima, whatever else is given."""
    for size in (1, 9, 256, 257, 2000):
        x = logits_of(5, size, dtype=DTYPES[dtype], seed=size, kind="rounded")
        u = uniforms_of(5, seed=size)
        expected = x.argmax(-1)
        one_hot = torch.nn.functional.one_hot(expected, size)
        for named in ({"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.2}, {"top_k": 1},
                      {"top_k": 1, "temperature": 9.0, "min_p": 0.5}, {"top_p": 1e-12}):  # fmt: skip
            assert torch.equal(ops.sample(x, u, **named), expected)
            assert torch.equal(ops.sampling_probs(x, **named), one_hot.to(ops.sampling_probs(x).dtype))


@DTYPE
def test_filters_see_what_the_one_before_left(dtype):
    """By hand: 0.30, 0.30, 0.25 are 0.85 of the whole, so that 0.60 of it are 0.70 of them."""
    law = torch.tensor([0.05, 0.30, 0.10, 0.30, 0.25], dtype=torch.float64).log().to(DTYPES[dtype])
    kept = {
        (0, 0.59, 0.0): (1, 3), (0, 0.62, 0.0): (1, 3, 4), (3, 0.69, 0.0): (1, 3), (3, 0.75, 0.0): (1, 3, 4),
        (0, 1.0, 0.8): (1, 3, 4), (0, 1.0, 0.9): (1, 3), (4, 0.97, 0.2): (1, 2, 3, 4), (4, 0.97, 0.5): (1, 3, 4),
    }  # fmt: skip
    for (top_k, top_p, min_p), tokens in kept.items():
        got = ops.sampling_probs(law, top_k=top_k, top_p=top_p, min_p=min_p)
        assert tuple(got.nonzero().flatten().tolist()) == tokens, (top_k, top_p, min_p)
        assert abs(got.sum() - 1) < 1e-6


@DTYPE
def test_permuted_ids_permute_the_law(dtype):
    for size in (5, 300, 5000):
        x = logits_of(size, dtype=DTYPES[dtype], seed=size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        for named in ({}, {"temperature": 0.4}):
            got, expected = ops.sampling_probs(x[order], **named), ops.sampling_probs(x, **named)[order]
            torch.testing.assert_close(got, expected, rtol=1e-14 if dtype == "f64" else 2.0**-23, atol=0)


@DTYPE
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e30, 1.7e308])
def test_extreme_temperatures(dtype, temperature):
    """Nothing becomes NaN: all on the largest, or equal parts for all that are not excluded."""
    x = torch.tensor([-torch.inf, 1.0, 3.0, 3.0, -2.0, 0.0], dtype=DTYPES[dtype])
    expected = [0, 0, 0.5, 0.5, 0, 0] if temperature < 1 else [0, 0.2, 0.2, 0.2, 0.2, 0.2]
    got = ops.sampling_probs(x, temperature=temperature, top_p=0.999)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=1e-6, atol=0)


@DTYPE
@EACH_FILTER
def test_layout_rows_and_threads_do_not_matter(dtype, filters):
    rows, size = sized(30, 2), sized(900, 300)
    x, u = logits_of(2, rows, 3, size, dtype=DTYPES[dtype]), uniforms_of(2, rows, 3)
    law, drawn = ops.sampling_probs(x, **filters), ops.sample(x, u, **filters)
    assert all(same_bits(ops.sampling_probs(place(x), **filters), law) for place in LAYOUTS.values())
    assert all(same_bits(ops.sample(place(x), place(u), **filters), drawn) for place in LAYOUTS.values())
    at = rows // 2
    assert same_bits(ops.sampling_probs(x[1:, at : at + 1], **filters), law[1:, at : at + 1].contiguous())
    assert same_bits(ops.sample(x[1, at, 2], u[1, at, 2], **filters), drawn[1, at, 2])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(ops.sampling_probs(x, **filters), law)
        assert same_bits(ops.sample(x, u, **filters), drawn)


def test_the_first_flawed_row_is_named():
    """Whichever thread finds one first."""
    rows = sized(400, 40)
    x, at = normal(rows, 500), rows // 3
    x[at, 499], x[2 * at] = torch.nan, -torch.inf
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for _ in range(sized(20, 1)):
            with pytest.raises(RuntimeError, match=rf"sampling_probs: logits: expected .+, got NaN in row {at}$"):
                ops.sampling_probs(x)


@pytest.mark.skipif(NAME == "simt", reason="simt: 100 000 rows are minutes on the host machine")
@EACH_FILTER
def test_frequencies(filters):
    """100 000 draws of 12 tokens against the reference's law. A chi-square of up to 11 degrees above 39 happens once
    in 19 000 right samplers; the seeds are fixed."""
    n, x = 100_000, 1.5 * normal(12, seed=3)
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    p = reference.sampling_probs(x.double(), **filters)
    counts = torch.bincount(ops.sample(x.expand(n, -1), u, **filters), minlength=12).double()
    assert (counts[p == 0] == 0).all()
    assert ((counts - n * p) ** 2 / (n * p))[p > 0].sum() < 39


@DTYPE
def test_a_large_vocabulary(dtype):
    """Tokens beyond 2^16, edges of radix bins of every width."""
    x = logits_of(2, sized(152_064, 70_000), dtype=DTYPES[dtype])
    x[1] = x[1] / 64 + 1000
    for named in (*FILTERS.values(), {"top_k": 5000}, {"top_p": 0.99999}):
        law, kept = sampling_probs_bound(x, **named)
        got = ops.sampling_probs(x, **named)
        assert law.worst(got) <= 1 and not (got[~kept.possibly] != 0).any()
        tokens = ops.sample(x, torch.tensor([0.3, 0.999], dtype=torch.float64), **named)
        assert (got.gather(-1, tokens[:, None]) > 0).all()
