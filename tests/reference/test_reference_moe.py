"""The mixture-of-experts reference: against torch.topk and hand-made examples; the table of published routers."""

from __future__ import annotations

import math

import pytest
import torch
from effops import reference
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_softmax_routing_against_topk():
    z = draw(40, 16)
    weights, ids = reference.topk_routing(z, 4)
    best = z.softmax(-1).topk(4)
    assert torch.equal(ids.long(), best.indices) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(weights, z.topk(4).values.softmax(-1))  # top-k, then softmax
    torch.testing.assert_close(reference.topk_routing(z, 4, renormalize=False, scale=3.0)[0], 3 * best.values)


def test_ties_and_scores_by_hand():
    z = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert reference.topk_routing(z, 3)[1].tolist() == [[1, 2, 0]]
    weights, ids = reference.topk_routing(z, 2, scoring="sigmoid", bias=torch.tensor([1.0, 0, 0, 0]))
    high, low = 1 / (1 + math.exp(-1)), 0.5
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[low, high]]) / (low + high))


def test_deepseek_groups_by_hand():
    """Eight experts in four groups; the two best groups by the sum of their two best values."""
    s = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.3, 0.3, 0.7, 0.2]])
    options = {"groups": 4, "topk_group": 2}
    z = s.logit()
    assert reference.topk_routing(z, 3, scoring="sigmoid", group_score="top2", **options)[1].tolist() == [[0, 2, 3]]
    assert reference.topk_routing(z, 3, scoring="sigmoid", group_score="max", **options)[1].tolist() == [[0, 6, 7]]
    assert reference.topk_routing(z, 4, scoring="sigmoid", group_score="max", **options)[1].tolist() == [[0, 6, 7, 1]]


@pytest.mark.parametrize("score", ["max", "top2"])
def test_groups_against_a_loop(score):
    z, bias = draw(30, 24, seed=1), draw(24, seed=2).float()
    _, ids = reference.topk_routing(z, 5, scoring="sigmoid", bias=bias, groups=6, topk_group=3, group_score=score)
    for row, got in zip(z.sigmoid() + bias, ids.tolist(), strict=True):
        groups = [sorted(row[4 * g : 4 * g + 4].tolist(), reverse=True) for g in range(6)]
        value = [g[0] if score == "max" else g[0] + g[1] for g in groups]
        kept = sorted(range(6), key=lambda g: -value[g])[:3]
        allowed = [e for e in range(24) if e // 4 in kept]
        assert got == sorted(allowed, key=lambda e: -row[e].item())[:5]


def test_a_nan_spoils_its_row_alone():
    z = draw(3, 6)
    z[1, 4] = torch.nan
    for scoring in ("softmax", "sigmoid"):
        weights, ids = reference.topk_routing(z, 2, scoring=scoring, renormalize=False)
        assert weights.isnan().any(-1).tolist() == [False, True, False] and weights[1].isnan().all()
        assert (ids[1].sort().values.diff() > 0).all()


def test_sort_by_hand():
    """The example of vLLM's moe_align_block_size, without its padding, and one with dropped choices."""
    order, inverse, offsets = reference.moe_sort(int32(0, 2, 2, 1).view(2, 2), 3)
    assert order.tolist() == [0, 3, 1, 2] and offsets.tolist() == [1, 2, 4]
    assert inverse.tolist() == [[0, 2], [3, 1]]
    order, inverse, offsets = reference.moe_sort(int32(-1, 1, 1, -1).view(2, 2), 3)
    assert order.tolist() == [1, 2, 0, 3] and offsets.tolist() == [0, 2, 2]
    assert inverse.tolist() == [[-1, 0], [1, -1]]


def test_permute_and_unpermute_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    xp, offsets, inverse = reference.moe_permute(x, int32(1, 0, -1, 0).view(2, 2), 2)
    assert xp.tolist() == [[1, 2], [3, 4], [1, 2], [0, 0]] and offsets.tolist() == [2, 3]
    assert inverse.tolist() == [[2, 0], [-1, 1]]
    weights = torch.tensor([[0.5, 2.0], [torch.nan, 1.0]])
    assert reference.moe_unpermute(xp, weights, inverse).tolist() == [[2.5, 5], [3, 4]]
    assert reference.moe_unpermute(xp, None, inverse).tolist() == [[2, 4], [3, 4]]


def test_grouped_mm_by_hand():
    x, w = torch.eye(3)[[0, 1, 2, 0]], torch.arange(12.0).view(2, 3, 2)
    bias = torch.tensor([[100.0, 200.0], [0.0, 1.0]])
    assert reference.grouped_mm(x, w, int32(1, 3)).tolist() == [[0, 1], [8, 9], [10, 11], [0, 0]]
    assert reference.grouped_mm(x, w, int32(2, 2), bias=bias).tolist() == [[100, 201], [102, 203], [0, 0], [0, 0]]
    sizes = {"in_sizes": int32(2, 3), "out_sizes": int32(1, 2)}
    assert reference.grouped_mm(x, w, int32(3, 4), **sizes).tolist() == [[0, 0], [2, 0], [0, 0], [6, 7]]
    dw = reference.grouped_mm_weight_gradient(x, torch.ones(4, 2), int32(1, 3))
    assert dw.tolist() == [[[1, 1], [0, 0], [0, 0]], [[0, 0], [1, 1], [1, 1]]]


def test_the_weight_gradient_is_that_of_autograd():
    x, w, dy = draw(9, 4), draw(3, 4, 5, seed=1).requires_grad_(), draw(9, 5, seed=2)
    for sizes in ({}, {"in_sizes": int32(1, 4, 0), "out_sizes": int32(5, 2, 3)}):
        y = reference.grouped_mm(x, w, int32(2, 2, 8), **sizes)
        (expected,) = torch.autograd.grad((y * dy).sum(), w)
        torch.testing.assert_close(reference.grouped_mm_weight_gradient(x, dy, int32(2, 2, 8), **sizes), expected)


ACTIVATIONS = {
    "silu": lambda g, u: g / (1 + math.exp(-g)) * u,
    "gelu": lambda g, u: g * 0.5 * (1 + math.erf(g / math.sqrt(2))) * u,
    "gelu_tanh": lambda g, u: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    "relu2": lambda g, u: max(g, 0) ** 2 * u,
    "swiglu_oai": lambda g, u: min(g, 7) / (1 + math.exp(-1.702 * min(g, 7))) * (max(-7, min(u, 7)) + 1),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_experts_by_hand(activation, interleaved):
    """One number in, one out: the gate g x, the up value u x, twice the product."""
    for gate, up in ((0.5, -2.0), (-3.0, 4.0), (9.0, -8.0), (1.0, 10.0), (0.0, 1.0)):
        w = torch.tensor([gate, up], dtype=torch.float64).view(1, 2, 1)
        down, ones = torch.full((1, 1, 1), 2.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        call = {"w_gate_up": w, "w_down": down, "weights": 0.25 * ones, "ids": int32(0).view(1, 1)}
        got = reference.fused_experts(ones, **call, activation=activation, interleaved=interleaved)
        assert got.item() == pytest.approx(0.5 * ACTIVATIONS[activation](gate, up), rel=1e-12)


def test_fused_experts_is_a_loop_over_tokens():
    x, up, down = draw(7, 6), draw(4, 10, 6, seed=1), draw(4, 6, 5, seed=2)
    weights, ids = draw(7, 3, seed=3), torch.randint(-1, 4, (7, 3), generator=torch.Generator().manual_seed(4)).int()
    bias_up, bias_down = draw(4, 10, seed=5), draw(4, 6, seed=6)
    biases = {"bias_gate_up": bias_up, "bias_down": bias_down}
    for options in ({}, {"interleaved": True}):
        got = reference.fused_experts(x, up, down, weights, ids, **biases, **options)
        for t in range(7):
            total = torch.zeros(6, dtype=torch.float64)
            for w, e in zip(weights[t], ids[t].tolist(), strict=True):
                if e < 0:
                    continue
                h = up[e] @ x[t] + bias_up[e]
                gate, value = (h[::2], h[1::2]) if options else (h[:5], h[5:])
                total += w * (down[e] @ (torch.nn.functional.silu(gate) * value) + bias_down[e])
            torch.testing.assert_close(got[t], total)
    without = reference.fused_experts(x, up[:, :5], down, weights, ids, activation="relu2")
    h = torch.einsum("efd,td->tef", up[:, :5], x).relu().square()
    y = torch.einsum("edf,tef->ted", down, h)
    picked = y.gather(1, ids.clamp(min=0).long()[..., None].expand(-1, -1, 6))
    torch.testing.assert_close(without, (torch.where(ids < 0, 0, weights)[..., None] * picked).sum(1))


def test_int8_is_its_dequantised_weight():
    x, weights, ids = draw(3, 6).float(), torch.ones(3, 1), int32(0, 1, 0).view(3, 1)
    up, down = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((2, 8, 6), (2, 6, 4)))
    scales = [draw(2, n, seed=n).float() for n in (8, 6)]
    wide = [w.float() * s[..., None] for w, s in zip((up, down), scales, strict=True)]
    got = reference.fused_experts(x, up, down, weights, ids, scale_gate_up=scales[0], scale_down=scales[1])
    torch.testing.assert_close(got, reference.fused_experts(x, *wide, weights, ids))


def test_lora_experts_by_hand():
    x, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0], [torch.nan, 9]]]), torch.tensor([[[3.0, torch.nan]]])
    call = {"ids": int32(0, -1).view(1, 2), "weights": torch.tensor([[2.0, 5.0]]), "ranks": int32(1)}
    assert reference.lora_experts(x, a, b, **call).tolist() == [[6]]
    assert reference.lora_experts(x, a, b, **call, base=torch.tensor([[0.5]])).tolist() == [[6.5]]


def test_expert_choice_by_hand():
    probs = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.7, 0.3], [0.6, 0.4]])
    weights, tokens = reference.expert_choice_routing(probs.log(), 2)
    assert tokens.tolist() == [[0, 2], [1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.7], [0.9, 0.4]]))


def test_limit_capacity_by_hand():
    ids = int32(0, 1, 0, 1, 1, 0).view(3, 2)
    assert reference.limit_capacity(ids, 2, 2).tolist() == [[0, 1], [0, -1], [1, -1]]
    assert reference.limit_capacity(ids, 2, 2, priority="token").tolist() == [[0, 1], [0, 1], [-1, -1]]
    scores = torch.tensor([0.1, 0.2, 0.9])
    assert reference.limit_capacity(ids, 2, 1, priority="score", scores=scores).tolist() == [[-1, -1], [0, -1], [1, -1]]
    assert reference.limit_capacity(ids, 2, 3).equal(ids) and (reference.limit_capacity(ids, 2, 0) == -1).all()
    assert reference.expert_capacity(10, 2, 8, 1.25) == 4 and reference.expert_capacity(10, 2, 5, 1.0) == 4


def test_losses_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    ids = int32(0, 1, 1, 2).view(2, 2)
    mean = [0.3, 0.525, 0.175]
    even = sum(f * p for f, p in zip([0.25, 0.5, 0.25], mean, strict=True))
    first = sum(f * p for f, p in zip([0.5, 0.5, 0.0], mean, strict=True))
    loss = reference.load_balancing_loss
    assert loss(probs, ids).item() == pytest.approx(3 * even)
    assert loss(probs, ids, convention="hf").item() == pytest.approx(6 * even)
    assert loss(probs, ids, convention="gshard").item() == pytest.approx(first / 3)
    mask = torch.tensor([True, False])
    assert loss(probs, ids, mask=mask).item() == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.25))
    uniform = torch.full((6, 3), 1 / 3)
    assert loss(uniform, int32(0, 1, 2, 0, 1, 2).view(6, 1)).item() == pytest.approx(1)
    z = torch.tensor([[math.log(2), math.log(3)], [0.0, 0.0]])
    assert reference.router_z_loss(z).item() == pytest.approx((math.log(5) ** 2 + math.log(2) ** 2) / 2)
    assert reference.router_z_loss(z, torch.tensor([False, True])).item() == pytest.approx(math.log(2) ** 2)
