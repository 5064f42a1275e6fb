"""``medusa_draft``: the reference's tokens, exactly where arithmetic is exact, in ties too; laws of its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import CALLS
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, int32
from torch import Tensor

pytestmark = pytest.mark.core

TOKENS = 30


def whole(*shape: int, seed: int, high: int = 2) -> Tensor:
    """Small whole numbers."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def one_a_row(*shape: int, seed: int) -> Tensor:
    """Matrices with a single 1 or -1 in each row: products are no larger than what they read."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(shape[-1], shape[:-1], generator=generator)[..., None]
    sign = 2.0 * torch.randint(2, place.shape, generator=generator).double() - 1
    return torch.zeros(shape, dtype=torch.float64).scatter_(-1, place, sign)


@st.composite
def exact_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Calls whose every step is exact in every dtype: whole numbers up to 256, and silu of 40 and more, or of 0."""
    batch, d, layers, heads, vocab = (draw(st.integers(*x)) for x in ((0, 3), (1, 40), (1, 2), (1, 3), (1, 70)))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    nodes, seed = draw(st.integers(1, 9)), draw(st.integers(0, 99))
    depths = [0, *(draw(st.integers(1, heads)) for _ in range(nodes - 1))]
    ranks = [0, *(draw(st.integers(0, vocab - 1)) for _ in range(nodes - 1))]
    linear = draw(st.booleans())  # silu is the identity; otherwise it is 0
    bias = torch.full((layers, heads, d), 64.0 if linear else 0.0)
    weight = one_a_row(layers, heads, d, d, seed=seed) * linear
    roots, lm = draw(st.booleans()), (heads, vocab, d) if draw(st.booleans()) else (vocab, d)
    call: dict[str, Any] = {
        "hidden": whole(batch, d, seed=seed + 1), "weight": weight, "bias": bias,
        "projections": one_a_row(heads, d, d, seed=seed + 2) if draw(st.booleans()) else None,
        "roots": one_a_row(heads, d, d, seed=seed + 3) if roots else None,
        "embedding": whole(TOKENS, d, seed=seed + 4) if roots else None, "lm_head": one_a_row(*lm, seed=seed + 5),
    }  # fmt: skip
    call = {n: None if x is None else x.to(dtype) for n, x in call.items()}
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(TOKENS, (vocab,), generator=generator) if draw(st.booleans()) else None
    call |= {"root": torch.randint(TOKENS, (batch,), generator=generator), "vocabulary": names}
    return call | {"depths": int32(*depths), "ranks": int32(*ranks)}


@given(c=exact_calls(), data=st.data())
def test_is_the_reference_ties_included(c, data):
    places = {n: LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))] for n, x in c.items() if isinstance(x, Tensor)}
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    got = ops.medusa_draft(**c | {n: place(c[n]) for n, place in places.items()})
    assert torch.equal(got, reference.medusa_draft(**c))


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 40])
def test_is_the_reference_on_ordinary_numbers(rows):
    """In float64, where rounding decides no rank of these."""
    c = CALLS["medusa_draft"]()
    c = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in c.items()}
    generator = torch.Generator().manual_seed(rows)
    c["hidden"] = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    c["root"] = torch.randint(9, (rows,), generator=generator)
    for name in ("projections", "vocabulary", None):
        call = c | ({name: None} if name else {})
        assert torch.equal(ops.medusa_draft(**call), reference.medusa_draft(**call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_see_the_others(dtype):
    c = CALLS["medusa_draft"]()
    c = {n: x.to(DTYPES[dtype]) if x.is_floating_point() else x for n, x in c.items()}
    together = ops.medusa_draft(**c)
    for b in range(2):
        alone = ops.medusa_draft(**c | {n: c[n][b : b + 1] for n in ("hidden", "root")})
        assert torch.equal(alone, together[b : b + 1])


def test_nodes_are_independent_and_the_root_alone_needs_no_head():
    c = CALLS["medusa_draft"]()
    together = ops.medusa_draft(**c)
    for i in range(1, 4):
        one = {n: c[n][[0, i]] for n in ("depths", "ranks")}
        assert torch.equal(ops.medusa_draft(**c | one), together[:, [0, i]])
    root = {n: c[n][:1] for n in ("depths", "ranks")}
    assert torch.equal(ops.medusa_draft(**c | root)[:, 0], c["root"])
