"""The bounds of the mixture-of-experts ops hold for arithmetic in the dtype, and see small mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effops import reference
from effops.reference import moe_bounds as bounds
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "all": {"renormalize": False, "scale": 3.0},
    "sigmoid": {"scoring": "sigmoid", "bias": torch.linspace(-0.3, 0.3, 24)},
    "groups": {"scoring": "sigmoid", "groups": 6, "topk_group": 3, "group_score": "top2"},
}
EACH_ROUTING = pytest.mark.parametrize("options", ROUTINGS.values(), ids=list(ROUTINGS))


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@EACH_DTYPE
@EACH_ROUTING
def test_routing_weights(dtype, options):
    logits = 3 * draw(200, 24, dtype=dtype)
    weights, ids = reference.topk_routing(logits, 5, **options)
    exact = bounds.topk_routing_bound(logits, ids, **options)
    assert exact.worst(weights) <= 1
    assert exact.worst(weights * (1 + (1e-4 if dtype != torch.float64 else 1e-12))) > 1
    assert exact.worst(weights.roll(1, 1)) > 1


@EACH_DTYPE
@EACH_ROUTING
def test_routing_choices(dtype, options):
    logits = draw(200, 24, dtype=dtype)
    _, ids = reference.topk_routing(logits, 5, **options)
    assert bounds.routing_is_right(logits, ids, **options).all()
    swapped, other, twice = ids.clone(), ids.clone(), ids.clone()
    swapped[:, [0, 1]] = ids[:, [1, 0]]
    other[:, 4] = torch.tensor([next(e for e in range(23, -1, -1) if e not in row) for row in ids.tolist()])
    twice[:, 1] = ids[:, 0]
    assert bounds.routing_is_right(logits, swapped, **options).float().mean() < 0.1
    assert bounds.routing_is_right(logits, other, **options).float().mean() < 0.2
    assert not bounds.routing_is_right(logits, twice, **options).any()
    assert not bounds.routing_is_right(logits, ids - 24, **options).any()


def test_routing_ties_have_one_answer():
    logits = torch.zeros(1, 6)
    logits[0, [2, 4]] = 1.0
    right = bounds.routing_is_right
    assert right(logits, int32(2, 4, 0)[None]).all()
    for wrong in ((4, 2, 0), (2, 4, 1), (2, 0, 4)):
        assert not right(logits, int32(*wrong)[None]).any()
    near = torch.tensor([[1.0, 1.0 + 2.0**-23, 0.0]])
    for order in ((0, 1), (1, 0)):
        assert right(near, int32(*order)[None]).all(), "nearer than the rounding of a softmax"


def test_routing_groups_have_one_answer():
    logits = torch.tensor([[3.0, 0.0, 2.0, 2.0, 1.0, 1.0]])
    options = {"groups": 3, "topk_group": 1, "scoring": "sigmoid"}
    for score, best in (("max", (0, 1)), ("top2", (2, 3))):
        for ids in ((0, 1), (2, 3), (4, 5), (0, 2)):
            right = bounds.routing_is_right(logits, int32(*ids)[None], group_score=score, **options)
            assert right.item() == (ids == best), (score, ids)


@EACH_DTYPE
def test_unpermute(dtype):
    y, weights = draw(30, 50, dtype=dtype), draw(20, 3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    inverse = torch.randint(-1, 30, (20, 3), generator=torch.Generator().manual_seed(1)).int()
    got = reference.moe_unpermute(y, weights, inverse)
    exact = bounds.moe_unpermute_bound(y, weights, inverse)
    assert exact.worst(got) <= 1
    assert exact.worst(reference.moe_unpermute(y, weights, torch.where(inverse == inverse[0, 0], -1, inverse))) > 1
    twice = y.float() + y.float() * 2.0**-6 if dtype != torch.float64 else y * (1 + 1e-14)
    assert exact.worst(reference.moe_unpermute(twice, weights, inverse)) > 1


@EACH_DTYPE
def test_grouped(dtype):
    x, w, bias = draw(20, 64, dtype=dtype), draw(4, 64, 30, dtype=dtype, seed=1), draw(4, 30, dtype=dtype, seed=2)
    ends, sizes = int32(5, 5, 12, 19), {"in_sizes": int32(64, 3, 40, 9), "out_sizes": int32(30, 30, 11, 0)}
    for options in ({}, sizes):
        exact = bounds.grouped_mm_bound(x, w, ends, bias=bias, **options)
        assert exact.worst(reference.grouped_mm(x, w, ends, bias=bias, **options)) <= 1
        assert exact.worst(reference.grouped_mm(x, w, ends, **options)) > 1
        assert exact.worst(reference.grouped_mm(x, w, ends - 1, bias=bias, **options)) > 1
        assert (exact.error[19] == 0).all(), "rows left over are exactly zero"
        dy = draw(20, 30, dtype=dtype, seed=3)
        gradient = bounds.grouped_mm_weight_gradient_bound(x, dy, ends, **options)
        assert gradient.worst(reference.grouped_mm_weight_gradient(x, dy, ends, **options)) <= 1
        assert gradient.worst(reference.grouped_mm_weight_gradient(x, dy, int32(5, 6, 12, 19), **options)) > 1
        assert (gradient.error[1] == 0).all(), "so are groups without rows"


@EACH_DTYPE
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"])
def test_fused(dtype, activation):
    x, up, down = (
        draw(12, 40, dtype=dtype),
        (draw(4, 60, 40, seed=1) / 6).to(dtype),
        (draw(4, 40, 30, seed=2) / 5).to(dtype),
    )
    weights = draw(12, 2, seed=3).abs().to(torch.float64 if dtype == torch.float64 else torch.float32)
    ids = torch.randint(4, (12, 2), generator=torch.Generator().manual_seed(4)).int()
    call = {"w_gate_up": up, "w_down": down, "weights": weights, "ids": ids, "activation": activation}
    exact = bounds.fused_experts_bound(x, **call)
    got = reference.fused_experts(x, **call)
    assert exact.worst(got) <= 1
    assert exact.worst(reference.fused_experts(x, **call | {"ids": ids.flip(0)})) > 1
    assert exact.worst(reference.fused_experts(x, **call | {"interleaved": True})) > 1
    assert exact.worst(got.double() * 1.05) > 1
    other = "gelu_tanh" if activation == "silu" else "silu"
    assert exact.worst(reference.fused_experts(x, **call | {"activation": other})) > 1


def test_fused_sees_the_two_gelus():
    """In float32 the tanh approximation is not the function itself."""
    x, up, down = draw(40, 16).float(), draw(1, 32, 16, seed=1).float() / 4, draw(1, 16, 16, seed=2).float() / 4
    call = {"w_gate_up": up, "w_down": down, "weights": torch.ones(40, 1), "ids": torch.zeros(40, 1, dtype=torch.int32)}
    got = reference.fused_experts(x, **call, activation="gelu_tanh")
    assert bounds.fused_experts_bound(x, **call, activation="gelu").worst(got) > 1
