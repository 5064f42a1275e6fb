"""How far the results of the mixture-of-experts ops may lie from the exact ones, and which choices of experts are
right. The notation and the model of rounding are those of :mod:`effops.reference.bounds`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.reference.bounds import FLUSH, ROUNDOFF, Interval, _chain, _compute_roundoff, _interval, _smallest
from effops.reference.moe import activated, gate_and_up, grouped_mm, grouped_mm_weight_gradient, moe_unpermute

# The largest slope of each activation in its gate (relu2: a factor of the gate), rounded up.
SLOPES = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "swiglu_oai": 1.1}


def _scores(logits: Tensor, scoring: str) -> Interval:
    """The scores of ``topk_routing`` [N,E].

    softmax: exp(z - m) takes w |z - m| from the difference and 4 w from exp, together r; their sum is off by the mean
    R of r under the law and by g(E + 1); the quotient rounds once. sigmoid: exp, sum and quotient, 12 w in all.
    """
    z, w = logits.detach().to(torch.float64), _compute_roundoff(logits.dtype)
    if scoring == "sigmoid":
        s = z.sigmoid()
        return _interval(s, 12 * w * s + 4 * FLUSH, logits.dtype)
    s = z.softmax(-1)
    distance = torch.where(s > 0, z.amax(-1, keepdim=True) - z, 0.0)
    r = torch.expm1(w * (distance + 5))
    total = (s * r).sum(-1, keepdim=True) + _chain(z.shape[-1] + 1, w)
    error = s * (r + total + 2 * w) / (1 - total) + (z.shape[-1] + 1) * FLUSH
    return _interval(s, error, logits.dtype)


def topk_routing_bound(
    logits: Tensor,
    ids: Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    **_: Any,
) -> Interval:
    """The weights of ``topk_routing`` for the experts that were chosen, ids [N,k].

    Scores s as above, with errors e. With S their sum over the k (and 1e-20 for sigmoids) and D that of the errors, a
    quotient is off by ``(e + w D) / (S - D)`` and g(k + 3); the scale rounds twice. The softmax over the chosen logits
    is nearer than that.
    """
    w, chosen = _compute_roundoff(logits.dtype), ids.long()
    scores = Interval(*(x.gather(1, chosen) for x in _scores(logits, scoring)))
    value, error = scores
    if renormalize:
        total = scores.value.sum(-1, keepdim=True) + (1e-20 if scoring == "sigmoid" else 0.0)
        off = scores.error.sum(-1, keepdim=True)
        value = scores.value / total
        error = torch.where(off < total, (scores.error + value * off) / (total - off), torch.inf)
    error = error + value * _chain(ids.shape[1] + 5, w)
    return Interval(value * scale, abs(scale) * error + FLUSH)


def routing_is_right(
    logits: Tensor,
    ids: Tensor,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    **_: Any,
) -> Tensor:
    """bool [N]: may ``topk_routing`` choose ids [N,k] in this order?

    A selection value s + bias is off by t, the error of s and w of the sum. An expert that was passed over, or chosen
    later, may exceed one that was chosen by no more than both errors; where logits and biases are equal it has the
    higher id, for the arithmetic is the same. Groups that a right choice may contain: fewer than ``topk_group`` others
    are better for certain. Passed over counts in groups that it must contain: fewer than ``topk_group`` others are
    as good.
    """
    rows, experts = logits.shape
    chosen, w = ids.long(), _compute_roundoff(logits.dtype)
    if rows == 0:
        return torch.ones(0, dtype=torch.bool, device=logits.device)
    shift = torch.zeros(experts, dtype=torch.float64) if bias is None else bias.detach().to(torch.float64)
    scores = _scores(logits, scoring)
    value = scores.value + shift
    t = scores.error + w * value.abs()
    distinct = (chosen.sort(-1).values.diff(dim=-1) > 0).all(-1) & (chosen >= 0).all(-1) & (chosen < experts).all(-1)
    chosen = chosen.clamp(0, experts - 1)
    must = torch.ones_like(value, dtype=torch.bool)
    right = distinct
    if groups > 1:
        size, count = experts // groups, 2 if group_score == "top2" else 1
        best = (value - t, value + t)
        low, high = (x.unflatten(1, (groups, size)).topk(count, -1).values.sum(-1) for x in best)
        low, high = low - 2 * w * low.abs(), high + 2 * w * high.abs()
        better = (low[:, None, :] > high[:, :, None]).sum(-1)  # than the second index
        as_good = (high[:, None, :] >= low[:, :, None]).sum(-1) - 1
        may = (better < topk_group).repeat_interleave(size, 1)
        must = (as_good < topk_group).repeat_interleave(size, 1)
        used = torch.zeros(rows, groups, dtype=torch.bool, device=ids.device).scatter(1, chosen // size, True)
        right = right & may.gather(1, chosen).all(-1) & (used.sum(-1) <= topk_group)
    place = torch.full_like(value, ids.shape[1], dtype=torch.int64)
    place.scatter_(1, chosen, torch.arange(ids.shape[1], device=ids.device).expand_as(chosen))
    number = torch.arange(experts, device=ids.device)
    for j in range(ids.shape[1]):
        own = chosen[:, j : j + 1]
        behind = (place > j) & (must | (place < ids.shape[1]))
        above = value - t > value.gather(1, own) + t.gather(1, own)
        equal = (logits == logits.gather(1, own)) & (shift == shift[own]) & (number < own)
        right = right & ~(behind & (above | equal)).any(-1)
    return right


def moe_unpermute_bound(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Interval:
    """``moe_unpermute``: a sum of K products (g(K + 2)), rounded once."""
    u, w, choices = ROUNDOFF[y.dtype], _compute_roundoff(y.dtype), inverse.shape[1]
    y64 = y.detach().to(torch.float64)
    w64 = None if weights is None else weights.detach().to(torch.float64).masked_fill(inverse < 0, 0)
    value = moe_unpermute(y64, w64, inverse)
    magnitude = moe_unpermute(y64.abs(), None if w64 is None else w64.abs(), inverse)
    largest = 1.0 if w64 is None or w64.numel() == 0 else w64.abs().amax()
    error = _chain(choices + 2, w) * magnitude * (1 + u) + u * value.abs()
    return _interval(value, error + choices * FLUSH * (1 + largest) + _smallest(y.dtype), y.dtype)


def _masked(x: Tensor, sizes: Tensor | None, dim: int) -> Tensor:
    """x [E,d,f], zero in what the groups do not have of d (dim 1) or f."""
    if sizes is None:
        return x
    index = torch.arange(x.shape[dim], device=x.device)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(index.view(shape) < sizes.view(-1, *[1] * (x.dim() - 1)), x, 0)


def grouped_mm_bound(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    in_sizes: Tensor | None = None,
    out_sizes: Tensor | None = None,
) -> Interval:
    """``grouped_mm``: sums of d products and a bias (g(d + 3)), rounded once. What groups do not have may be NaN."""
    u, c = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    sizes = {"in_sizes": in_sizes, "out_sizes": out_sizes}
    x64, w64 = x.detach().to(torch.float64), w.detach().to(torch.float64)
    b64 = None if bias is None else bias.detach().to(torch.float64)
    value = grouped_mm(x64, w64, offsets, bias=b64, **sizes)
    magnitude = grouped_mm(x64.abs(), w64.abs(), offsets, bias=None if b64 is None else b64.abs(), **sizes)
    tiny = grouped_mm(torch.ones_like(x64), w64.abs(), offsets, **sizes)
    tiny = tiny + grouped_mm(x64.abs(), torch.ones_like(w64), offsets, **sizes) + 1
    error = _chain(x.shape[1] + 3, c) * magnitude * (1 + u) + u * value.abs() + FLUSH * tiny + _smallest(x.dtype)
    absent = grouped_mm(torch.ones_like(x64), torch.ones_like(w64), offsets, out_sizes=out_sizes, bias=None) == 0
    absent = absent if x.shape[1] else torch.zeros_like(absent)
    return _interval(value, torch.where(absent, 0.0, error), x.dtype)


def grouped_mm_weight_gradient_bound(
    x: Tensor, dy: Tensor, offsets: Tensor, *, in_sizes: Tensor | None = None, out_sizes: Tensor | None = None
) -> Interval:
    """``grouped_mm_weight_gradient``: sums over a group's rows (g(rows + 2)), rounded once; zeros are exact."""
    u, c = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    sizes = {"in_sizes": in_sizes, "out_sizes": out_sizes}
    x64, dy64 = x.detach().to(torch.float64), dy.detach().to(torch.float64)
    value = grouped_mm_weight_gradient(x64, dy64, offsets, **sizes)
    magnitude = grouped_mm_weight_gradient(x64.abs(), dy64.abs(), offsets, **sizes)
    ones_x, ones_dy = torch.ones_like(x64), torch.ones_like(dy64)
    rows = grouped_mm_weight_gradient(ones_x, ones_dy, offsets, **sizes)
    tiny = grouped_mm_weight_gradient(ones_x, dy64.abs(), offsets, **sizes)
    tiny = tiny + grouped_mm_weight_gradient(x64.abs(), ones_dy, offsets, **sizes) + 1
    error = _chain(rows + 2, c) * magnitude * (1 + u) + u * value.abs() + FLUSH * tiny + _smallest(x.dtype)
    return _interval(value, torch.where(rows == 0, 0.0, error), x.dtype)


def _activation_bound(h: Interval, gated: bool, interleaved: bool, name: str, w: float) -> Interval:
    """The activation of h, before it is rounded: its slope times the error of the gate, and that of the up value;
    itself it takes 12 w of the result, and where 1 + erf or 1 + tanh may cancel 8 w of the gate."""
    gate, up = gate_and_up(h.value, gated, interleaved)
    gate_error, up_error = gate_and_up(h.error, gated, interleaved)
    value, alone = activated(gate, up, name), activated(gate, None, name)
    slope = 2 * (gate.abs() + gate_error) if name == "relu2" else SLOPES[name]
    off = slope * gate_error + 12 * w * alone.abs()
    if name.startswith("gelu"):
        off = off + 8 * w * gate.abs()
    off = off + FLUSH * (1 + gate.abs())
    if up is None or up_error is None:
        return Interval(value, off)
    factor = (up.clamp(-7, 7) + 1).abs() if name == "swiglu_oai" else up.abs()
    up_error = up_error + 2 * w * factor
    return Interval(value, off * (factor + up_error) + alone.abs() * up_error)


def fused_experts_bound(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    scale_gate_up: Tensor | None = None,
    scale_down: Tensor | None = None,
    sizes: tuple[tuple[Tensor, int], tuple[Tensor, int]] | None = None,
) -> Interval:
    """``fused_experts``, expert by expert. ``sizes``: of weights in few bits, what their products are of the size of,
    [E,2f,d] and [E,d,f], and their groups: a step and a difference each are two roundings more.

    h: sums of d products, a scale and a bias (g(d + 5)), and it may be rounded (u). a: the activation, rounded (u).
    y: the error of a through the absolute weights, g(f + 5) of the absolute sum, and it may be rounded (u). The sum of
    the K weighted y takes g(K + 2), and is rounded.
    """
    u, c = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    wide = x.detach().to(torch.float64)
    one = torch.ones((), dtype=torch.float64)
    w1 = w_gate_up.detach().to(torch.float64) * (one if scale_gate_up is None else scale_gate_up.double()[..., None])
    w2 = w_down.detach().to(torch.float64) * (one if scale_down is None else scale_down.double()[..., None])
    (size1, groups1), (size2, groups2) = sizes or ((w1.abs(), 0), (w2.abs(), 0))
    size1, size2 = size1.double(), size2.double()
    gated = w1.shape[1] != w2.shape[2]
    value, error, magnitude = (torch.zeros_like(wide) for _ in range(3))
    for e in range(w1.shape[0]):
        token, choice = (ids == e).nonzero(as_tuple=True)
        own = wide[token]
        b1 = 0 * w1[e, :, 0:1].sum(-1) if bias_gate_up is None else bias_gate_up[e].detach().double()
        b2 = 0 * w2[e, :, 0:1].sum(-1) if bias_down is None else bias_down[e].detach().double()
        h, h_size = own @ w1[e].mT + b1, own.abs() @ size1[e].mT + b1.abs()
        h_off = _chain(w1.shape[2] + 2 * groups1 + 5, c) * h_size
        h_off = h_off * (1 + u) + u * h.abs() + _smallest(x.dtype) + FLUSH * w1.shape[2] * (1 + _largest(own, w1[e]))
        a = _activation_bound(Interval(h, h_off), gated, interleaved, activation, c)
        a_off = a.error * (1 + u) + u * a.value.abs() + _smallest(x.dtype)
        y, y_size = a.value @ w2[e].mT + b2, (a.value.abs() + a_off) @ size2[e].mT + b2.abs()
        y_off = a_off @ w2[e].abs().mT + _chain(w2.shape[2] + 2 * groups2 + 5, c) * y_size
        y_off = (
            y_off * (1 + u) + u * y.abs() + _smallest(x.dtype) + FLUSH * w2.shape[2] * (1 + _largest(a.value, w2[e]))
        )
        weight = weights[token, choice].detach().double()[:, None]
        value.index_add_(0, token, weight * y)
        error.index_add_(0, token, weight.abs() * y_off)
        magnitude.index_add_(0, token, weight.abs() * (y.abs() + y_off))
    total = error + _chain(ids.shape[1] + 2, c) * magnitude
    total = total * (1 + u) + u * value.abs() + FLUSH * (ids.shape[1] + 1) + _smallest(x.dtype)
    named = (ids >= 0).any(-1, keepdim=True)
    return _interval(value, torch.where(named, total, 0.0), x.dtype)


def _largest(a: Tensor, b: Tensor) -> Tensor | float:
    return a.abs().amax() + b.abs().amax() if a.numel() and b.numel() else 0.0
