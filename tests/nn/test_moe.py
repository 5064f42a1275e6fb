"""Router, experts and balancing against loops over tokens and experts."""

from __future__ import annotations

import copy

import pytest
import torch
from effops.nn import BiasBalancer, MoE, RMSNorm, Router
from torch.nn import functional as F

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5, generator=generator)
    return module


def rows(n=11, d=12, seed=1, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(moe, x, weights, ids):
    """The sum over a token's experts, one product at a time."""
    out = []
    for token, chosen, shares in zip(x, ids.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for e, share in zip(chosen, shares, strict=True):
            if e < 0:
                continue
            hidden = moe.w_gate_up[e] @ token + (0 if moe.bias_gate_up is None else moe.bias_gate_up[e])
            if moe.interleaved:
                gate, up = hidden[::2], hidden[1::2]
            elif len(hidden) == 2 * moe.w_down.shape[2]:
                gate, up = hidden.chunk(2)
            else:
                gate, up = hidden, 1
            act = {"silu": F.silu, "relu2": lambda g: g.relu() ** 2}[moe.activation](gate) * up
            total = total + share * (moe.w_down[e] @ act + (0 if moe.bias_down is None else moe.bias_down[e]))
        out.append(total)
    return torch.stack(out)


@torch.no_grad()
def test_router_scores_and_choices():
    router, x = filled(Router(12, 7, 3)), rows()
    logits, weights, ids = router(x)
    torch.testing.assert_close(logits, x @ router.weight.T, **TOLERANCE)
    expected = logits.topk(3)
    assert torch.equal(ids.long(), expected.indices) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, expected.values.softmax(-1), **TOLERANCE)


@torch.no_grad()
def test_router_bias_counts_in_the_choice_alone():
    router, x = filled(Router(12, 8, 2, scoring="sigmoid", renormalize=False, scale=2.0, selection_bias=True)), rows()
    router.selection_bias[5] = 10
    logits, weights, ids = router(x)
    assert (ids[:, 0] == 5).all()
    torch.testing.assert_close(weights, 2 * logits.sigmoid().gather(1, ids.long()), **TOLERANCE)


@torch.no_grad()
def test_router_is_float32_inside():
    """Logits of bfloat16 weights and tokens are those of the same numbers in float32, and the bias is never cast."""
    router = filled(Router(64, 5, 2, selection_bias=True)).to(torch.bfloat16)
    router.selection_bias[:] = torch.tensor([1.0, 1 + 2**-20, 0, 0, 0])
    x = rows(4, 64, dtype=torch.bfloat16)
    assert torch.equal(router(x).logits, F.linear(x.float(), router.weight.float()))
    assert router.to(torch.float16).selection_bias.tolist()[1] == 1 + 2**-20
    assert router.to(torch.float64)(x.double()).logits.dtype == torch.float64


VARIANTS = {
    "plain": {},
    "biases": {"bias": True},
    "interleaved": {"interleaved": True},
    "ungated": {"gated": False, "activation": "relu2"},
    "shared": {"shared_size": 10},
    "shared-gate": {"shared_size": 10, "shared_gate": True},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_moe_is_its_parts(name, grad):
    moe, norm = filled(MoE(12, 9, 6, 2, **VARIANTS[name])), filled(RMSNorm(12))
    x = rows().view(1, 11, 12)
    with torch.set_grad_enabled(grad):
        out = moe(x, residual=2 * x, norm=norm)
        plain = moe(x)
    assert out.requires_grad == grad and out.shape == x.shape
    with torch.no_grad():
        for got, given, residual in ((out, F.rms_norm(x, (12,), norm.weight, 1e-6), 2 * x), (plain, x, 0)):
            _, weights, ids = moe.router(given[0])
            expected = by_hand(moe, given[0], weights, ids)
            if moe.shared is not None:
                shared = moe.shared(given[0])
                if moe.shared_gate is not None:
                    shared = shared * (given[0] @ moe.shared_gate.weight.T).sigmoid()
                expected = expected + shared
            torch.testing.assert_close(got.detach(), expected[None] + residual, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_panels_are_the_same_layer(name):
    moe, x = filled(MoE(12, 9, 6, 2, **VARIANTS[name])), rows()
    plain = moe(x)
    int8 = copy.deepcopy(moe).pack_("int8")
    assert moe.pack_() is moe and not any(n.startswith("w_") for n, _ in moe.named_parameters())
    torch.testing.assert_close(moe(x), plain, **TOLERANCE)
    error = (int8(x) - plain).abs().max()
    assert 0 < error < 0.1 * plain.abs().max()


def test_panels_are_for_inference():
    moe = filled(MoE(12, 9, 6, 2)).pack_()
    with pytest.raises(RuntimeError, match="weights in panels have no gradient"):
        moe(rows().requires_grad_())
    with pytest.raises(RuntimeError, match="MoE: state_dict: expected experts with parameters, got weights in panels"):
        moe.state_dict()
    with pytest.raises(ValueError, match="MoE: pack_: expected weights on the CPU, got panels"):
        moe.pack_()
    with pytest.raises(ValueError, match="MoE: pack_: expected weights on the CPU, got device meta"):
        MoE(12, 9, 6, 2, device="meta").pack_()
    with pytest.raises(ValueError, match=r"pack_experts: format: expected one of int8, int4, .+, got int3"):
        MoE(12, 9, 6, 2).pack_("int3")
    with pytest.raises(ValueError, match=r"w_down: expected float32, bfloat16 or float16, got torch\.float64"):
        MoE(12, 9, 6, 2).double().pack_()


def test_gradients_of_every_parameter():
    moe = filled(MoE(6, 4, 4, 2, bias=True, shared_size=3, shared_gate=True)).double()
    x = rows(5, 6, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in moe.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *moe.parameters()), atol=1e-6)


@torch.no_grad()
def test_capacity_drops_the_later_choices():
    """One token an expert: of two identical tokens the second one gets nothing."""
    moe = filled(MoE(12, 9, 4, 1, capacity_factor=2.0))
    x = rows(1).repeat(2, 1)  # ceil(2 · 2 · 1 / 4) = 1
    out = moe(x)
    torch.testing.assert_close(out[0], by_hand(moe, x, *moe.router(x)[1:])[0], **TOLERANCE)
    assert torch.equal(out[1], torch.zeros(12))
    moe.capacity_factor = 4.0
    torch.testing.assert_close(moe(x)[1], out[0], **TOLERANCE)


@torch.no_grad()
def test_capacity_by_score_keeps_the_surest_token():
    moe = filled(MoE(12, 9, 2, 1, capacity_factor=1.0, drop_priority="score", renormalize=False))
    x = rows(8)
    x = x[moe.router(x).ids[:, 0] == 0][:2]
    weights = moe.router(x).weights[:, 0]
    kept = int(weights.argmax())
    out = moe(x.flip(0) if kept == 0 else x)  # the surest stands last
    assert not out[0].any() and out[1].any()


def test_losses_on_request():
    moe = filled(MoE(12, 9, 4, 2, collect=("balance", "z")))
    x = rows(32)
    moe(x)
    logits, _, ids = moe.router(x)
    share = F.one_hot(ids.long(), 4).float().mean((0, 1))
    torch.testing.assert_close(moe.losses["balance"], 4 * (share * logits.softmax(-1).mean(0)).sum(), **TOLERANCE)
    torch.testing.assert_close(moe.losses["z"], logits.logsumexp(-1).square().mean(), **TOLERANCE)
    for loss in moe.losses.values():
        (gradient,) = torch.autograd.grad(loss, moe.router.weight, retain_graph=True)
        assert gradient.abs().max() > 0
    moe = filled(MoE(12, 9, 4, 2))
    moe(x)
    assert moe.losses == {}


def test_balancer_follows_deepseek():
    router = filled(Router(12, 4, 2, selection_bias=True))
    balancer = BiasBalancer(router, rate=0.25)
    balancer.observe(torch.tensor([[0, 1], [0, -1]], dtype=torch.int32))
    balancer.observe(torch.tensor([[0, 2]], dtype=torch.int32))  # counts 3 1 1 0, mean 1.25
    balancer.step()
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]
    balancer.step()  # nothing observed: all equal
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.25]


@torch.no_grad()
def test_balancer_evens_the_load():
    """On one batch again and again the busiest expert loses tokens until all are near the mean."""
    moe, x = filled(MoE(12, 4, 6, 2, scoring="sigmoid", selection_bias=True)).train(), rows(300) + 1
    balancer = BiasBalancer(moe.router, rate=0.01)
    before = None
    for _ in range(200):
        moe(x)
        balancer.observe(moe.ids)
        before = balancer.counts.max() if before is None else before
        counts = balancer.counts.clone()
        balancer.step()
    assert before > 150 and counts.max() <= 110  # the mean is 100


def test_faults():
    with pytest.raises(ValueError, match=r"Router: k: expected 1 to num_experts \(4\), got 5"):
        Router(8, 4, 5)
    with pytest.raises(ValueError, match=r"Router: groups: expected a divisor of num_experts \(4\), got 3"):
        Router(8, 4, 2, groups=3)
    with pytest.raises(ValueError, match="MoE: collect: expected some of balance, z, got 'x'"):
        MoE(8, 4, 4, 2, collect=("x",))
    with pytest.raises(ValueError, match="BiasBalancer: router: expected one with selection_bias=True"):
        BiasBalancer(Router(8, 4, 2))
    balancer = BiasBalancer(Router(8, 4, 2, selection_bias=True))
    with pytest.raises(ValueError, match="BiasBalancer: ids: expected experts below 4, got 4"):
        balancer.observe(torch.tensor([[4]]))
