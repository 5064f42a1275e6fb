"""Gradients of the mixture-of-experts ops: finite differences in float64, the reference's autograd, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend import cpu_only
from effops import ops, reference
from strategies.experts import layer_of, offsets_of, weights_of
from strategies.values import int32, normal, same_bits
from torch import Tensor

ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax over all": {"renormalize": False, "scale": -1.5},
    "sigmoid": {"scoring": "sigmoid", "scale": 2.5},
    "sigmoid alone": {"scoring": "sigmoid", "renormalize": False},
    "biased": {"bias": torch.tensor([0.5, 0, 0, -0.5, 0, 1.0, 0, 0]), "scoring": "sigmoid"},
    "groups": {"groups": 4, "topk_group": 2, "renormalize": False},
}
SIZES = {"plain": {}, "sizes": {"in_sizes": int32(5, 0, 3), "out_sizes": int32(2, 4, 3)}}


def double(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_()


def close(function: Any, other: Any, inputs: list[Tensor], rtol: float = 1e-5) -> None:
    """Two differentiable functions agree in values and in gradients."""
    results = []
    for call in (function, other):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        grads = torch.autograd.grad((out * normal(*out.shape, seed=9).to(out.dtype)).sum(), leaves)
        results.append((out.detach(), *grads))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@cpu_only("float64 finite differences")
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=list(ROUTINGS))
def test_routing(options):
    assert torch.autograd.gradcheck(lambda z: ops.topk_routing(z, 3, **options)[0], (double(5, 8),))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=list(ROUTINGS))
def test_routing_as_the_reference(options, dtype):
    logits = normal(19, 8, dtype=dtype)
    close(*(lambda z, m=m: m.topk_routing(z, 3, **options)[0] for m in (ops, reference)), [logits])


def test_routing_in_a_narrow_dtype():
    """The gradient is computed in float32 and rounded to the logits' dtype."""
    logits = normal(6, 8).bfloat16().requires_grad_()
    ops.topk_routing(logits, 3)[0][:, 0].sum().backward()
    wide = logits.detach().float().requires_grad_()
    reference.topk_routing(wide, 3)[0][:, 0].sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16(), rtol=2.0**-7, atol=1e-6)


@cpu_only("float64 finite differences")
def test_permute_and_unpermute():
    ids = int32(2, 0, -1, 2, 0, 2, -1, -1).view(4, 2)
    assert torch.autograd.gradcheck(lambda x: ops.moe_permute(x, ids, 3)[0], (double(4, 5),))
    inverse = int32(1, 4, -1, 4, 0, 1).view(3, 2)  # places 2 and 3 are nobody's, 1 and 4 serve two
    call = double(5, 4), double(3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda y, w: ops.moe_unpermute(y, w, inverse), call)
    assert torch.autograd.gradcheck(lambda y: ops.moe_unpermute(y, None, inverse), call[:1])
    nothing = torch.full((3, 2), -1, dtype=torch.int32)
    y, w = torch.autograd.grad(ops.moe_unpermute(*call, nothing).sum(), call)
    assert (y == 0).all() and (w == 0).all()


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permute_and_unpermute_as_the_reference(dtype):
    ids = torch.randint(-1, 5, (21, 3), generator=torch.Generator().manual_seed(1)).int()
    x, weights = normal(21, 17, dtype=dtype), weights_of(21, 3, dtype)

    def both(module: Any) -> Any:
        def run(x: Tensor, w: Tensor) -> Tensor:
            xp, _, inverse = module.moe_permute(x, ids, 5)
            return module.moe_unpermute(xp.sin(), w, inverse)

        return run

    close(both(ops), both(reference), [x, weights])


def test_unpermute_ignores_absent_weights():
    """A NaN beside -1 reaches neither the result nor a gradient."""
    y, w = normal(4, 6).requires_grad_(), torch.tensor([[0.5, torch.nan]]).requires_grad_()
    ops.moe_unpermute(y, w, int32(2, -1)[None]).sum().backward()
    assert y.grad.isfinite().all() and w.grad[0, 0].isfinite() and w.grad[0, 1] == 0


@cpu_only("float64 finite differences")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_grouped_mm(sizes):
    ends = int32(2, 2, 5)
    x, w, bias = double(6, 5), double(3, 5, 4, seed=1), double(3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.grouped_mm(x, w, ends, bias=b, **sizes), (x, w, bias))
    assert torch.autograd.gradcheck(lambda x, w: ops.grouped_mm(x, w.mT, ends), (x, double(3, 4, 5, seed=3)))


@pytest.mark.core
@pytest.mark.parametrize("load", [(5, 0, 9), (0, 0, 3), (60, 1, 0), (0, 0, 0)])
def test_grouped_mm_as_the_reference(load):
    ends, rows = offsets_of(list(load)), sum(load) + 2
    sizes = {"in_sizes": int32(20, 7, 11), "out_sizes": int32(0, 9, 18)}
    inputs = [normal(rows, 20), normal(3, 20, 18, seed=1), normal(3, 18, seed=2)]
    for named in ({}, sizes):
        close(*(lambda x, w, b, m=m, n=named: m.grouped_mm(x, w, ends, bias=b, **n) for m in (ops, reference)), inputs)


def fused(module: Any, ids: Tensor, names: list[str], **options: Any) -> Any:
    def run(x: Tensor, weights: Tensor, *layer: Tensor) -> Tensor:
        named = dict(zip(names, layer, strict=True))
        return module.fused_experts(x, weights=weights, ids=ids, **named, **options)

    return run


@cpu_only("float64 finite differences")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"])
def test_fused_experts(activation):
    ids = int32(0, 2, -1, 1, 2, 2).view(3, 2)
    layer = layer_of(3, 4, 3, torch.float64, biased=True)
    inputs = [double(3, 4), weights_of(3, 2, torch.float64).requires_grad_()]
    leaves = [t.requires_grad_() for t in layer.values()]
    for interleaved in (False, True):
        run = fused(ops, ids, list(layer), activation=activation, interleaved=interleaved)
        assert torch.autograd.gradcheck(run, (*inputs, *leaves))


@pytest.mark.core
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai"])
def test_fused_experts_as_the_reference(activation, gated):
    if activation == "swiglu_oai" and not gated:
        return
    ids = torch.randint(-1, 4, (13, 2), generator=torch.Generator().manual_seed(2)).int()
    layer = layer_of(4, 24, 15, torch.float32, gated, biased=True)
    inputs = [normal(13, 24), weights_of(13, 2, torch.float32), *layer.values()]
    close(*(fused(m, ids, list(layer), activation=activation) for m in (ops, reference)), inputs, rtol=1e-4)


@cpu_only("float64 finite differences")
def test_a_whole_layer():
    """From the logits of a router to the sum of the experts: through weights and inputs at once."""
    router, layer = double(5, 6, seed=4), [t.requires_grad_() for t in layer_of(6, 5, 3, torch.float64).values()]

    def run(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights, ids = ops.topk_routing(x @ router, 2, scoring="sigmoid")
        return x + ops.fused_experts(x, up, down, weights, ids)

    assert torch.autograd.gradcheck(run, (double(4, 5, seed=5), router, *layer))


@cpu_only("float64 finite differences")
def test_lora_experts():
    ids, ranks = int32(0, 1, -1, 1, 0, 0).view(3, 2), int32(2, 1)
    tensors = double(3, 4), double(2, 2, 4, seed=1), double(2, 5, 2, seed=2), double(3, 2, seed=3), double(3, 5, seed=4)

    def run(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, base: Tensor) -> Tensor:
        return ops.lora_experts(x, a, b, ids, weights, ranks=ranks, base=base)

    assert torch.autograd.gradcheck(run, tensors)


@cpu_only("float64 finite differences")
def test_expert_choice_and_losses():
    logits = double(6, 4)
    assert torch.autograd.gradcheck(lambda z: ops.expert_choice_routing(z, 3)[0], (logits,))
    ids, mask = ops.topk_routing(logits.detach(), 2)[1], torch.tensor([True, True, False, True, True, False])
    for convention in ("switch", "hf", "gshard"):
        assert torch.autograd.gradcheck(
            lambda z, c=convention: ops.load_balancing_loss(z.softmax(-1), ids, mask=mask, convention=c), (logits,)
        )
    assert torch.autograd.gradcheck(lambda z: ops.router_z_loss(z, mask), (logits,))


def test_what_has_no_gradient():
    logits = normal(4, 6)
    with pytest.raises(RuntimeError, match="topk_routing: bias: expected a tensor that does not require grad"):
        ops.topk_routing(logits, 2, bias=normal(6).requires_grad_())
    layer, ids = layer_of(3, 8, 5, torch.float32), int32(0, 1, 2).view(3, 1)
    x, weights = normal(3, 8).requires_grad_(), torch.ones(3, 1)
    packed = {name: ops.pack_experts(w) for name, w in layer.items()}
    with pytest.raises(RuntimeError, match=r"fused_experts: x: expected .+ \(int8 weights have no gradient\)"):
        ops.fused_experts(x, weights=weights, ids=ids, **packed)
    with pytest.raises(RuntimeError, match="fused_experts: ids: expected dtype int32, got int64"):
        ops.fused_experts(x, weights=weights, ids=ids.long(), **layer)
    with torch.no_grad():
        assert not ops.fused_experts(x, weights=weights, ids=ids, **packed).requires_grad


@cpu_only("panels are the CPU's")
def test_panels_have_no_gradient():
    layer, ids = layer_of(3, 8, 5, torch.float32), int32(0, 1, 2).view(3, 1)
    up, down = (ops.pack_experts(w, "f32", panels=True, gated=w.shape[1] == 10) for w in layer.values())
    with pytest.raises(
        RuntimeError, match=r"fused_experts: weights: expected .+ \(weights in panels have no gradient\)"
    ):
        ops.fused_experts(normal(3, 8), up, down, torch.ones(3, 1).requires_grad_(), ids)


def test_second_derivatives_raise():
    y, w = normal(4, 5).requires_grad_(), normal(3, 5, 2, seed=1).requires_grad_()
    calls = [ops.topk_routing(y, 2)[0], ops.moe_permute(y, int32(0, 1, 1, 0)[:, None], 2)[0],
             ops.moe_unpermute(y, None, int32(0, 1)[None]), ops.grouped_mm(y, w, int32(1, 2, 4))]  # fmt: skip
    for out in calls:
        (first,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            first.sum().backward()


def test_only_what_is_asked_for():
    """A leaf that needs no gradient gets none, and those of the others do not change."""
    ends, inputs = int32(2, 2, 5), [normal(6, 5), normal(3, 5, 4, seed=1), normal(3, 4, seed=2)]
    tracked = [x.clone().requires_grad_() for x in inputs]
    every = torch.autograd.grad(ops.grouped_mm(*tracked[:2], ends, bias=tracked[2]).sum(), tracked)
    for i in range(3):
        given = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        ops.grouped_mm(*given[:2], ends, bias=given[2]).sum().backward()
        assert [x.grad is not None for x in given] == [i == j for j in range(3)]
        assert same_bits(given[i].grad, every[i])


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_of_a_layer_with_gradients(interleaved):
    layer, ids = layer_of(3, 8, 5, torch.float32, biased=True), int32(0, 1, 2, -1).view(2, 2)
    call = {"x": normal(2, 8), "weights": weights_of(2, 2, torch.float32), **layer}
    named = {name: t.requires_grad_() for name, t in call.items()} | {"ids": ids, "interleaved": interleaved}
    torch.library.opcheck(torch.ops.effops.fused_experts.default, (), named)
