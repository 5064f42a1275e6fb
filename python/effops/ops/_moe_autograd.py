"""Gradients of the mixture-of-experts ops, and the differentiable form of ``fused_experts``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from effops.ops._autograd import first_order, needs_grad, tensors

_ops = torch.ops.effops
_Gradients = tuple[Tensor | None, ...]


class _TopkRouting(torch.autograd.Function):
    """Through the weights alone. With s the scores, of the softmax over the chosen experts where weights are
    renormalised: ds of the weights, then dz of the scores."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            weights, ids = _ops.topk_routing(logits, k, **options)
        ctx.softmax = options.get("scoring", "softmax") == "softmax"
        ctx.renormalize, ctx.scale = options.get("renormalize", True), options.get("scale", 1.0)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(logits, ids)
        return weights, ids

    @staticmethod
    @first_order
    def backward(ctx: Any, d_weights: Tensor, _: Tensor | None) -> _Gradients:
        logits, ids = ctx.saved_tensors
        z, at, g = logits.to(d_weights.dtype), ids.long(), ctx.scale * d_weights
        if not ctx.softmax:
            s = z.gather(1, at).sigmoid()
            if ctx.renormalize:
                total = s.sum(1, keepdim=True) + 1e-20
                g = (g - (g * s).sum(1, keepdim=True) / total) / total
            dz = torch.zeros_like(z).scatter(1, at, g * s * (1 - s))
        elif ctx.renormalize:
            s = z.gather(1, at).softmax(1)
            dz = torch.zeros_like(z).scatter(1, at, s * (g - (g * s).sum(1, keepdim=True)))
        else:
            s = z.softmax(1)
            ds = torch.zeros_like(z).scatter(1, at, g)
            dz = s * (ds - (ds * s).sum(1, keepdim=True))
        return dz.to(logits.dtype), None, None


def _topk_routing(logits: Tensor, k: int, **options: Any) -> Any:
    bias = options.get("bias")
    if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        raise RuntimeError(
            "topk_routing: bias: expected a tensor that does not require grad, got one that does (it counts in the "
            "selection alone, which has no gradient)"
        )
    if needs_grad((logits,), options):
        return _TopkRouting.apply(logits, k, options)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.topk_routing.default(logits, k, **options)


class _MoePermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            xp, offsets, inverse = _ops.moe_permute(x, ids, num_experts)
        ctx.mark_non_differentiable(offsets, inverse)
        ctx.save_for_backward(inverse)
        return xp, offsets, inverse

    @staticmethod
    @first_order
    def backward(ctx: Any, d_xp: Tensor, *_: Tensor | None) -> _Gradients:
        return _ops.moe_unpermute(d_xp, None, *ctx.saved_tensors), None, None


def _moe_permute(x: Tensor, ids: Tensor, num_experts: int) -> Any:
    if needs_grad((x,), {}):
        return _MoePermute.apply(x, ids, num_experts)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.moe_permute.default(x, ids, num_experts)


class _MoeUnpermute(torch.autograd.Function):
    """A place may be named by several slots, whose gradients add up, in the compute type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = _ops.moe_unpermute(y, weights, inverse)
        ctx.save_for_backward(y, weights, inverse)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor) -> _Gradients:
        y, weights, inverse = ctx.saved_tensors
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        absent, rows = (inverse < 0)[..., None], d_out.to(wide)[:, None]
        places = inverse.flatten().clamp(min=0)
        dy, d_weights = torch.zeros(y.shape, dtype=wide, device=y.device), None
        if ctx.needs_input_grad[0] and y.shape[0]:
            each = rows.expand(*inverse.shape, -1) if weights is None else weights[..., None] * rows
            dy.index_add_(0, places, each.masked_fill(absent, 0).flatten(0, 1))
        if ctx.needs_input_grad[1]:
            d_weights = torch.zeros_like(weights)
            if y.shape[0]:
                named = y.index_select(0, places).view(*inverse.shape, -1)
                d_weights = (named.to(wide) * rows).masked_fill(absent, 0).sum(-1)
        return dy.to(y.dtype) if ctx.needs_input_grad[0] else None, d_weights, None


def _moe_unpermute(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Any:
    if needs_grad((y, weights), {}):
        return _MoeUnpermute.apply(y, weights, inverse)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.moe_unpermute.default(y, weights, inverse)


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, options: dict[str, Any]
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _ops.grouped_mm(x, w, offsets, bias=bias, **options)
        ctx.invariant = options.get("batch_invariant", False)
        ctx.save_for_backward(x, w, offsets, options.get("in_sizes"), options.get("out_sizes"))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> _Gradients:
        x, w, offsets, ins, outs = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            sizes = {"in_sizes": outs, "out_sizes": ins}
            dx = _ops.grouped_mm(dy, w.mT, offsets, **sizes, batch_invariant=ctx.invariant)
        if ctx.needs_input_grad[1]:
            dw = _ops.grouped_mm_weight_gradient(x, dy, offsets, in_sizes=ins, out_sizes=outs)
        if ctx.needs_input_grad[2]:
            ones = dy.new_ones((dy.shape[0], 1))
            db = _ops.grouped_mm_weight_gradient(ones, dy, offsets, out_sizes=outs).squeeze(1)
        return dx, dw, db, None, None


def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, *, bias: Tensor | None = None, **options: Any) -> Any:
    if needs_grad((x, w, bias), {}):
        return _GroupedMm.apply(x, w, bias, offsets, options)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.grouped_mm.default(x, w, offsets, bias=bias, **options)


def _activated(h: Tensor, name: str, gated: bool, interleaved: bool) -> Tensor:
    """The activation in the compute type, rounded once."""
    wide = h if h.dtype == torch.float64 else h.float()
    gate, up = wide, None
    if gated:
        gate, up = (wide[:, ::2], wide[:, 1::2]) if interleaved else wide.chunk(2, 1)
    if name == "silu":
        a = silu(gate)
    elif name in ("gelu", "gelu_tanh"):
        a = gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
    elif name == "relu2":
        a = gate.relu().square()
    else:
        gate = gate.clamp(max=7)
        a = gate * (1.702 * gate).sigmoid()
        up = None if up is None else up.clamp(-7, 7) + 1
    return (a if up is None else a * up).to(h.dtype)


def _check_fused(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> None:
    """Raises what the op would: a call without tokens costs little."""
    x, weights, ids = (t[:0] if t.dim() else t for t in (x, weights, ids))
    with torch._C._AutoDispatchBelowAutograd():
        _ops.fused_experts.default(x, w_gate_up, w_down, weights, ids, **options)


def _fused_experts(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    args = (x, w_gate_up, w_down, weights, ids)
    if not needs_grad(args, options):
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.fused_experts.default(*args, **options)
    _check_fused(*args, **options)
    int8 = options.get("scale_gate_up") is not None
    if int8 or options.get("packed_features", 0):
        named = dict(zip(("x", "w_gate_up", "w_down", "weights"), args, strict=False)) | options
        culprit = next(n for n, t in tensors(named).items() if t.requires_grad)
        raise RuntimeError(
            f"fused_experts: {culprit}: expected a tensor that does not require grad, got one that does "
            f"({'int8 weights' if int8 else 'weights in panels'} have no gradient)"
        )
    invariant = options.get("batch_invariant", False)
    xp, offsets, inverse = _ops.moe_permute(x, ids, w_gate_up.shape[0])
    h = _ops.grouped_mm(xp, w_gate_up.mT, offsets, bias=options.get("bias_gate_up"), batch_invariant=invariant)
    gated, interleaved = options.get("gated", True), options.get("interleaved", False)
    a = _activated(h, options.get("activation", "silu"), gated, interleaved)
    y = _ops.grouped_mm(a, w_down.mT, offsets, bias=options.get("bias_down"), batch_invariant=invariant)
    return _ops.moe_unpermute(y, weights, inverse)


MOE_AUTOGRAD: dict[str, Callable[..., Any]] = {
    "fused_experts": _fused_experts,
    "grouped_mm": _grouped_mm,
    "moe_permute": _moe_permute,
    "moe_unpermute": _moe_unpermute,
    "topk_routing": _topk_routing,
}
