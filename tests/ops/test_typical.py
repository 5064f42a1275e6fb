"""``verify_typical`` against its rule, and the laws of what it accepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies.layouts import LAYOUTS
from strategies.trees import draw_uniforms, equal, trees
from strategies.values import int32, normal

pytestmark = pytest.mark.core


@pytest.mark.parametrize("drawn", [False, True])
@given(data=st.data())
def test_typical(drawn, data):
    tree, vocab = data.draw(trees()), data.draw(st.integers(2, 6))
    laws = (2 * normal(1, len(tree), vocab, seed=data.draw(st.integers(0, 2**32)))).softmax(-1)
    tokens = torch.tensor([[data.draw(st.integers(0, vocab - 1)) for _ in tree]])
    options: dict[str, Any] = {name: data.draw(st.floats(0, 1)) for name in ("epsilon", "delta")}
    if drawn:
        options["uniforms"] = torch.tensor(draw_uniforms(data, 1), dtype=torch.float64)
    call = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](int32(*tree)[None]), tokens, laws
    assert equal(ops.verify_typical(*call, **options), reference.verify_typical(*call, **options))


def typical(tree: list[int], tokens: list[int], laws: Any, **options: Any) -> list[int]:
    got = ops.verify_typical(int32(*tree)[None], torch.tensor([tokens]), torch.tensor([laws]).float(), **options)
    return [i for i in got.nodes[0].tolist() if i >= 0]


def test_typical_thresholds_are_strict():
    """p = 1/4 against epsilon 1/4; equal laws over four tokens against exp(-H), which the 1e-5 puts above 1/4."""
    law = [[0.25, 0.75]] * 2
    assert typical([-1, 0], [9, 0], law, epsilon=0.25, delta=1.0) == [0]
    assert typical([-1, 0], [9, 0], law, epsilon=math.nextafter(0.25, 0), delta=1.0) == [0, 1]
    assert typical([-1, 0], [9, 0], [[0.25] * 4] * 2, epsilon=1.0, delta=1.0) == [0]
    assert typical([-1, 0], [9, 0], [[0.25] * 4] * 2, epsilon=1.0, delta=0.9999) == [0, 1]


def test_typical_chooses():
    """The longest; of equals the likeliest; of those the first. Everything of positive probability with delta 0."""
    law, options = [0.2, 0.5, 0.3, 0.0], {"epsilon": 1.0, "delta": 0.0}
    assert typical([-1, 0, 0, 1], [9, 2, 1, 2], [law] * 4, **options) == [0, 1, 3]
    assert typical([-1, 0, 0, 1, 2], [9, 0, 1, 1, 1], [law] * 5, **options) == [0, 2, 4]
    assert typical([-1, 0, 0], [9, 1, 1], [law] * 3, **options) == [0, 1]
    assert typical([-1, 0, 0, 1], [9, 3, 0, 1], [law] * 4, **options) == [0, 2]


@given(data=st.data())
def test_typical_is_monotone(data):
    """A smaller epsilon or delta never accepts less."""
    tree = data.draw(trees())
    laws = normal(1, len(tree), 5, seed=data.draw(st.integers(0, 999))).softmax(-1)
    tokens = torch.tensor([[data.draw(st.integers(0, 4)) for _ in tree]])
    counts = [
        [int(ops.verify_typical(int32(*tree)[None], tokens, laws, epsilon=e, delta=d).count) for e in (0, 0.1, 0.2, 1)]
        for d in (0, 0.3, 0.8, 1)
    ]
    assert all(row == sorted(row, reverse=True) for row in counts)
    assert all(list(column) == sorted(column, reverse=True) for column in zip(*counts, strict=True))
