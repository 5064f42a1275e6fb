"""Routed low-rank experts, expert choice, capacities: compositions of the ops against the reference and their laws."""

from __future__ import annotations

import pytest
import torch
from backend import NAME
from effops import ops, reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import experts
from strategies.experts import PLACES, poisoned, weights_of
from strategies.values import DTYPES, int32, normal, same_bits

ON_BACKEND = {name: dtype for name, dtype in DTYPES.items() if NAME == "cpu" or name != "f64"}
DTYPE = pytest.mark.parametrize("dtype", ON_BACKEND)  # float64 products are the CPU's
TOLERANCE = {"f32": 1e-5, "bf16": 0.06, "f16": 0.01, "f64": 1e-13}  # of values near one, with the low product rounded


@DTYPE
@given(data=st.data())
def test_lora_experts(dtype, data):
    """Ranks that differ, NaN beyond them; ids that drop and repeat; with and without a base."""
    count, tokens, k = (
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from((0, 1, 3, 20))),
        data.draw(st.integers(1, 3)),
    )
    dim, out, rank = (data.draw(st.sampled_from(s)) for s in ((1, 8, 33, 64), (1, 17, 40), (1, 2, 8, 16)))
    x = normal(tokens, dim, dtype=DTYPES[dtype])
    a = (normal(count, rank, dim, seed=1) / dim**0.5).to(x.dtype)
    b = (normal(count, out, rank, seed=2) / rank**0.5).to(x.dtype)
    ids, weights = data.draw(experts.choices(tokens, k, count)), weights_of(tokens, k, x.dtype) / 2
    ranks = data.draw(experts.sizes(count, rank))
    base = normal(tokens, out, dtype=x.dtype, seed=3) if data.draw(st.booleans()) else None
    a, b = poisoned(a, ranks, 1), poisoned(b, ranks, 2)
    got = ops.lora_experts(
        data.draw(PLACES)(x), data.draw(PLACES)(a), data.draw(PLACES)(b), ids, weights, ranks=ranks, base=base
    )
    wide = reference.lora_experts(x.double(), a.double(), b.double(), ids, weights.double(), ranks=ranks,
                                  base=None if base is None else base.double())  # fmt: skip
    assert got.dtype == x.dtype
    scale = 1 + (weights.abs().double().sum(-1).amax().item() if tokens else 0)
    torch.testing.assert_close(got.double(), wide, rtol=TOLERANCE[dtype], atol=3 * scale * TOLERANCE[dtype])


@DTYPE
def test_one_adapter_for_all_is_plain_lora(dtype):
    x, a, b = (
        normal(9, 32, dtype=DTYPES[dtype]),
        normal(3, 4, 32, dtype=DTYPES[dtype], seed=1),
        normal(3, 20, 4, dtype=DTYPES[dtype], seed=2),
    )
    a, b = (a / 6).to(x.dtype), (b / 2).to(x.dtype)
    ids, weights = torch.full((9, 1), 2, dtype=torch.int32), weights_of(9, 1, x.dtype).fill_(1)
    got = ops.lora_experts(x, a, b, ids, weights)
    plain = x.double() @ a[2].double().mT @ b[2].double().mT
    torch.testing.assert_close(got.double(), plain, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@DTYPE
def test_tokens_without_an_adapter_are_the_base(dtype):
    x, base = normal(6, 16, dtype=DTYPES[dtype]), normal(6, 12, dtype=DTYPES[dtype], seed=4)
    a, b = normal(2, 3, 16, dtype=DTYPES[dtype], seed=1), normal(2, 12, 3, dtype=DTYPES[dtype], seed=2)
    ids = int32(0, -1, 1, -1, -1, 0).view(6, 1)
    got = ops.lora_experts(x, a, b, ids, weights_of(6, 1, x.dtype), base=base)
    alone = (ids < 0)[:, 0]
    assert same_bits(got[alone], base[alone]) and not torch.equal(got[~alone], base[~alone])


@DTYPE
def test_ranks_are_zero_padding(dtype):
    """Rows and columns of zeros beyond a rank give what leaving them out gives, within rounding."""
    x, ranks = normal(10, 24, dtype=DTYPES[dtype]), int32(8, 3, 0)
    a, b = (normal(3, *shape, seed=1).div(4).to(x.dtype) for shape in ((8, 24), (14, 8)))
    ids, weights = torch.arange(10).remainder(3).int()[:, None], weights_of(10, 1, x.dtype)
    cut = [
        torch.where(torch.arange(8).view(shape) < ranks.view(-1, 1, 1), t, 0) for t, shape in ((a, (8, 1)), (b, (1, 8)))
    ]
    got, padded = ops.lora_experts(x, a, b, ids, weights, ranks=ranks), ops.lora_experts(x, *cut, ids, weights)
    torch.testing.assert_close(got, padded, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (got[ids[:, 0] == 2] == 0).all()


@DTYPE
def test_expert_choice(dtype):
    for tokens, count, capacity in ((1, 1, 1), (10, 4, 3), (33, 5, 33)):
        logits = normal(tokens, count, dtype=DTYPES[dtype]).mul(2).round()  # ties
        weights, chosen = ops.expert_choice_routing(logits, capacity)
        expected = reference.expert_choice_routing(logits, capacity)
        assert torch.equal(chosen, expected[1]) and same_bits(weights, expected[0])
        assert (chosen.sort(-1).values.diff(dim=-1) > 0).all(), "an expert takes a token once"
    for wrong in (0, 34):
        with pytest.raises(ValueError, match=r"expert_choice_routing: capacity: expected a number in \[1, 33\] \(N\)"):
            ops.expert_choice_routing(logits, wrong)
    with pytest.raises(ValueError, match="expert_choice_routing: logits: expected shape"):
        ops.expert_choice_routing(logits[0], 1)


@given(data=st.data())
def test_capacity(data):
    tokens, k, count = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    ids, capacity = data.draw(experts.choices(tokens, k, count)), data.draw(st.integers(0, 12))
    for priority in ("choice", "token", "score"):
        scores = normal(tokens, k).mul(2).round() if priority == "score" else None
        got = ops.limit_capacity(ids, count, capacity, priority=priority, scores=scores)
        assert same_bits(got, reference.limit_capacity(ids, count, capacity, priority=priority, scores=scores))
        load = torch.bincount(got[got >= 0].long(), minlength=count)
        assert (load == torch.bincount(ids[ids >= 0].long(), minlength=count).clamp(max=capacity)).all()
        if scores is not None:
            alone = ops.limit_capacity(ids, count, capacity, priority=priority, scores=scores[:, 0])
            assert same_bits(got, alone)


def test_enough_capacity_drops_nothing():
    ids = torch.randint(-1, 5, (30, 3), generator=torch.Generator().manual_seed(1)).int()
    for priority in ("choice", "token"):
        assert ops.limit_capacity(ids, 5, 30 * 3, priority=priority).equal(ids)
    distinct = torch.rand(30, 5, generator=torch.Generator().manual_seed(2)).argsort(-1)[:, :3].int()
    assert ops.limit_capacity(distinct, 5, 30).equal(distinct), "an expert comes once a token: N slots hold all"


def test_expert_capacity():
    assert ops.expert_capacity(100, 2, 8, 1.0) == 25 and ops.expert_capacity(100, 2, 8, 1.25) == 32
    assert ops.expert_capacity(101, 2, 8, 1.0) == 26 and ops.expert_capacity(0, 2, 8, 1.0) == 0
    with pytest.raises(ValueError, match="expert_capacity: num_experts: expected 1 or more, got 0"):
        ops.expert_capacity(1, 1, 0, 1.0)
    with pytest.raises(ValueError, match="expert_capacity: factor: expected a finite number of 0 or more, got nan"):
        ops.expert_capacity(1, 1, 1, torch.nan)


def test_capacity_refuses():
    ids, scores = int32(0, 1, 1, 0).view(2, 2), torch.ones(2)
    refused = {
        "priority: expected choice, token or score, got first": {"priority": "first"},
        "capacity: expected 0 or more, got -1": {"capacity": -1},
        "scores: expected a tensor for priority score, got none": {"priority": "score"},
        "scores: expected none for priority token, got a tensor": {"priority": "token", "scores": scores},
        r"scores: expected shape \[N\] or \[N, K\], got \[3\]": {"priority": "score", "scores": torch.ones(3)},
    }
    for says, call in refused.items():
        with pytest.raises(ValueError, match=f"limit_capacity: {says}"):
            ops.limit_capacity(ids, 2, **{"capacity": 1, **call})
    with pytest.raises(RuntimeError, match="moe_sort: ids: expected values"):
        ops.limit_capacity(ids, 1, 1)
