"""``topk_routing``: weights within bounds, choices that rounding allows, exact where ties or groups decide, laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import sized
from effops import ops, reference
from effops.reference.moe_bounds import routing_is_right, topk_routing_bound
from hypothesis import given
from hypothesis import strategies as st
from strategies.experts import PLACES
from strategies.layouts import LAYOUTS
from strategies.values import DTYPES, normal, same_bits, values
from torch import Tensor

pytestmark = pytest.mark.core

DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EXPERTS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 60, 64, 65, 128, 130)
TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33)
PRESETS = {  # the table of published routers
    "switch": {"k": 1, "renormalize": False},
    "mixtral": {"k": 2},
    "olmoe": {"k": 8, "renormalize": False},
    "gpt-oss": {"k": 4},
    "deepseek-v2": {"k": 6, "renormalize": False, "groups": 8, "topk_group": 3, "scale": 16.0},
    "deepseek-v3": {"k": 8, "scoring": "sigmoid", "groups": 8, "topk_group": 4, "group_score": "top2", "scale": 2.5},
}


def biases(experts: int, seed: int = 5) -> Tensor:
    return 0.2 * normal(experts, seed=seed)


def check(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Calls the op; its weights are within their bound and its choices right."""
    weights, ids = ops.topk_routing(logits, k, **options)
    assert weights.shape == ids.shape == (logits.shape[0], k) and ids.dtype == torch.int32
    assert weights.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert weights.is_contiguous() and ids.is_contiguous()
    assert routing_is_right(logits, ids, **options).all()
    assert topk_routing_bound(logits, ids, **options).worst(weights) <= 1
    return weights, ids


def different(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/4, no two alike in a row."""
    orders = [torch.randperm(experts, generator=torch.Generator().manual_seed(t)) for t in range(tokens)]
    return ((torch.stack(orders) - experts // 2) / 4).to(dtype)


@st.composite
def calls(draw: st.DrawFn, experts: int) -> dict[str, Any]:
    divisors = [g for g in range(1, experts + 1) if experts % g == 0]
    groups = draw(st.sampled_from(divisors))
    kept = draw(st.integers(1, groups))
    scores = ("max", "top2") if experts // groups >= 2 else ("max",)
    return {
        "k": draw(st.integers(1, min(kept * (experts // groups), 12)) | st.just(kept * (experts // groups))),
        "scoring": draw(st.sampled_from(("softmax", "sigmoid"))), "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from((1.0, 2.5, -0.5, 0.0))), "groups": groups, "topk_group": kept,
        "group_score": draw(st.sampled_from(scores)),
        "bias": draw(st.none() | st.just(biases(experts)).flatmap(lambda b: PLACES.map(lambda place: place(b)))),
    }  # fmt: skip


@DTYPE
@given(data=st.data())
def test_any_call(dtype, data):
    experts, tokens = data.draw(st.sampled_from(EXPERTS)), data.draw(st.sampled_from(TOKENS))
    kind, seed = data.draw(st.sampled_from(("normal", "spikes", "zeros"))), data.draw(st.integers(0, 99))
    logits = 2 * values(tokens, experts, dtype=DTYPES[dtype], seed=seed, kind=kind)
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    check(data.draw(PLACES)(logits), **data.draw(calls(experts)))


@DTYPE
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_choose_what_the_reference_does(dtype, preset):
    """Multiples of 1/4 that are all different in a row: no rounding can confuse them."""
    options: dict[str, Any] = dict(PRESETS[preset])
    k = options.pop("k")
    logits = different(19, 64, dtype=DTYPES[dtype])
    if preset == "deepseek-v3":
        options["bias"] = torch.arange(64) % 2 / 1024.0
    weights, ids = check(logits, k, **options)
    expected = reference.topk_routing(logits.double(), k, **options)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(weights.double(), expected[0], rtol=2e-6, atol=1e-30)


@DTYPE
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_id(dtype, scoring):
    logits = torch.zeros(3, 40, dtype=DTYPES[dtype])
    logits[1, 7::5] = 1.0
    logits[2, 39] = -0.0
    for k in (1, 2, 9, 17, 40):
        ids = ops.topk_routing(logits, k, scoring=scoring)[1]
        best = [7 + 5 * i for i in range(7)]
        expected = (best + [i for i in range(40) if i not in best])[:k]
        assert ids.tolist() == [list(range(k)), expected, list(range(k))]


def test_ties_of_groups_go_to_the_lowest_group():
    logits = torch.zeros(1, 32)
    logits[0, 9] = logits[0, 25] = logits[0, 30] = 2.0
    for score, expected in (("max", [9, 8, 10, 11, 12, 13]), ("top2", [25, 30, 24, 26, 27, 28])):
        ids = ops.topk_routing(logits, 6, groups=4, topk_group=1, group_score=score)[1]
        assert ids[0].tolist() == expected


@DTYPE
def test_bias_selects_and_does_not_weigh(dtype):
    """With a large bias on some experts it is they, in the order of bias and score; their weights are those of their
    logits."""
    logits = normal(21, 50, dtype=DTYPES[dtype])
    bias = torch.zeros(50)
    bias[[3, 17, 44]] = 100.0
    for scoring in ("softmax", "sigmoid"):
        weights, ids = check(logits, 3, bias=bias, scoring=scoring, renormalize=False)
        assert (ids.sort(-1).values == torch.tensor([3, 17, 44])).all()
        alone = ops.topk_routing(logits, 50, scoring=scoring, renormalize=False)
        by_id = torch.zeros_like(alone[0]).scatter(1, alone[1].long(), alone[0])
        assert same_bits(weights, by_id.gather(1, ids.long()))


@pytest.mark.parametrize("score", ["max", "top2"])
def test_an_expert_that_may_never_come(score):
    """A bias of -inf comes last, and before experts of groups that do not take part."""
    logits, bias = normal(20, 24), torch.zeros(24)
    bias[[0, 5, 9]] = -torch.inf
    ids = ops.topk_routing(logits, 21, bias=bias, scoring="sigmoid")[1]
    assert not torch.isin(ids, torch.tensor([0, 5, 9])).any()
    assert (
        ops.topk_routing(logits, 24, bias=bias, scoring="sigmoid")[1]
        .sort(-1)
        .values.equal(torch.arange(24, dtype=torch.int32).expand(20, -1))
    )
    grouped = ops.topk_routing(logits, 6, bias=bias, scoring="sigmoid", groups=4, topk_group=1, group_score=score)[1]
    assert ((grouped // 6) == grouped[:, :1] // 6).all() and (grouped.sort(-1).values.diff(dim=-1) > 0).all()


@DTYPE
def test_softmax_then_top_k_is_top_k_then_softmax(dtype):
    logits = normal(33, 70, dtype=DTYPES[dtype])
    weights, ids = ops.topk_routing(logits, 5)
    wide = logits if dtype == "f64" else logits.float()
    torch.testing.assert_close(weights, wide.gather(1, ids.long()).softmax(-1), rtol=1e-6, atol=0)
    assert torch.equal(ids.long(), wide.sort(dim=-1, descending=True, stable=True).indices[:, :5])


@DTYPE
def test_all_experts_are_the_dense_softmax(dtype):
    logits = normal(9, 37, dtype=DTYPES[dtype])
    for options in ({}, {"renormalize": False}):
        weights, ids = ops.topk_routing(logits, 37, **options)
        dense = torch.zeros_like(weights).scatter(1, ids.long(), weights)
        wide = logits if dtype == "f64" else logits.float()
        torch.testing.assert_close(dense, wide.softmax(-1), rtol=2e-6, atol=1e-30)
        assert (weights.diff(dim=-1) <= 0).all()


@DTYPE
def test_shifted_logits(dtype):
    """A constant added to a row, which rounds nothing, changes no softmax."""
    logits = (normal(17, 30).mul(8).round() / 8).to(DTYPES[dtype])
    for options in ({}, {"renormalize": False}, {"groups": 5, "topk_group": 2}):
        expected, got = ops.topk_routing(logits, 4, **options), ops.topk_routing(logits + 4, 4, **options)
        assert all(map(same_bits, expected, got))


@DTYPE
def test_permuted_experts(dtype):
    """Experts in another order are chosen under their new names; groups move as a whole."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    by_group = torch.tensor([3, 0, 5, 1, 2, 4])[:, None] * 8 + torch.tensor([1, 0, 7, 2, 6, 3, 5, 4])
    logits, bias = different(20, 48, dtype=DTYPES[dtype]), biases(48)
    for names, options in ((order, {}), (order, {"scoring": "sigmoid", "bias": bias}),
                           (by_group.flatten(), {"groups": 6, "topk_group": 2, "scoring": "sigmoid",
                                                 "group_score": "top2"})):  # fmt: skip
        moved = options | ({"bias": bias[names]} if "bias" in options else {})
        weights, ids = ops.topk_routing(logits, 6, **options)
        other, renamed = ops.topk_routing(logits[:, names], 6, **moved)
        torch.testing.assert_close(weights, other, rtol=1e-6, atol=0)
        assert torch.equal(ids.long(), names[renamed.long()])


@DTYPE
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_stays_in_its_row(dtype, scoring):
    logits = normal(21, 33, dtype=DTYPES[dtype])
    plain = ops.topk_routing(logits, 4, scoring=scoring)
    for at in (0, 16, 32):
        flawed = logits.clone()
        flawed[5, at] = torch.nan
        for options in ({}, {"renormalize": False}, {"bias": biases(33)}, {"groups": 11, "topk_group": 5}):
            weights, ids = ops.topk_routing(flawed, 4, scoring=scoring, **options)
            assert weights[5].isnan().all() and weights.isnan().sum() == 4
            assert (ids[5].sort().values.diff() > 0).all() and ids[5].min() >= 0 and ids[5].max() < 33
        weights, ids = ops.topk_routing(flawed, 4, scoring=scoring)
        rest = torch.arange(21) != 5
        assert same_bits(weights[rest], plain[0][rest]) and same_bits(ids[rest], plain[1][rest])


def test_infinite_logits():
    """-inf is an expert of weight 0, which still has an id; a row of nothing else has no softmax."""
    logits = normal(3, 20)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    weights, ids = ops.topk_routing(logits, 12)
    assert (ids[0, :10] % 2 == 1).all() and ids[0, 10:].tolist() == [0, 2]
    assert (weights[0, 10:] == 0).all() and weights[1].isnan().all() and ids[1].tolist() == list(range(12))
    sigmoid = ops.topk_routing(logits, 12, scoring="sigmoid")[0]
    assert (sigmoid[0, 10:] == 0).all() and (sigmoid[1] == 0).all()
    logits[2, 3] = torch.inf
    assert ops.topk_routing(logits, 2, scoring="sigmoid", renormalize=False)[0][2, 0] == 1


@DTYPE
@pytest.mark.parametrize("preset", PRESETS)
def test_layout_batch_and_threads_do_not_matter(dtype, preset):
    """The same bits for a token in any memory, wherever it stands in whatever batch, on any number of threads."""
    options: dict[str, Any] = dict(PRESETS[preset])
    k, tokens = options.pop("k"), sized(500, 40)
    logits = normal(tokens, 64, dtype=DTYPES[dtype])
    weights, ids = ops.topk_routing(logits, k, **options)
    for place in LAYOUTS.values():
        assert all(map(same_bits, ops.topk_routing(place(logits), k, **options), (weights, ids)))
    for rows in (slice(3, 4), slice(7, 22), slice(1, 40)):
        got = ops.topk_routing(logits[rows], k, **options)
        assert same_bits(got[0], weights[rows]) and same_bits(got[1], ids[rows])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(same_bits, ops.topk_routing(logits, k, **options), (weights, ids)))
