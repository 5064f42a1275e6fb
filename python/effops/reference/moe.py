"""Mixture of experts: routing, expert order, products by expert, the whole layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, one_hot, silu


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def topk_routing(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """logits [N,E] -> weights [N,k] float32 (float64), ids int32 [N,k]: the largest s + bias of each row, descending,
    ties to the lowest id; weights are their s, divided by their sum where ``renormalize``, times ``scale``.

    s is the softmax over all experts or the sigmoid. With groups of neighbours only the ``topk_group`` groups with the
    largest maximum ("max"), or sum of the two largest ("top2"), of s + bias take part. A NaN makes its row's
    weights NaN.
    """
    wide = _widen(logits)
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    selection = selection_values(scores, bias, groups, topk_group, group_score)
    ids = selection.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(-1, ids)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total if scoring == "softmax" else total + 1e-20)
    weights = torch.where(logits.isnan().any(-1, keepdim=True), torch.nan, weights * scale)
    return weights, ids.int()


def selection_values(
    scores: Tensor, bias: Tensor | None = None, groups: int = 1, topk_group: int = 1, group_score: str = "max"
) -> Tensor:
    """What :func:`topk_routing` sorts, of scores [N,E]: s + bias, -inf for experts of groups that do not take part."""
    selection = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    if groups == 1:
        return selection
    selection = selection.clamp(min=torch.finfo(selection.dtype).min)  # what takes part comes before what does not
    by_group = selection.unflatten(1, (groups, -1))
    best = by_group.sort(dim=-1, descending=True).values[..., : 1 if group_score == "max" else 2].sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    stays = one_hot(kept, groups).sum(1).bool()
    return by_group.masked_fill(~stays[..., None], -torch.inf).flatten(1)


def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N,K] -> order [N·K], the slots (token·K + choice) by expert, stable, dropped ones (-1) last; inverse [N,K],
    each slot's place in it or -1; offsets [E], the end of each expert's places; int32."""
    flat = ids.flatten().long()
    order = torch.where(flat < 0, num_experts, flat).sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(flat.numel(), device=ids.device)
    counts = torch.bincount(flat[flat >= 0], minlength=num_experts)
    inverse = torch.where(flat < 0, -1, places).view(ids.shape)
    return order.int(), inverse.int(), counts.cumsum(0).int()


def moe_permute(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N,d] -> its rows in expert order [N·K,d], zero for dropped slots; offsets [E], inverse [N,K] of moe_sort."""
    order, inverse, offsets = moe_sort(ids, num_experts)
    rows = x.index_select(0, order // max(1, ids.shape[1]))
    kept = torch.arange(order.numel(), device=x.device) < offsets[-1]
    return torch.where(kept[:, None], rows, 0), offsets, inverse


def moe_unpermute(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """out[t] = Σ_j weights[t,j] · y[inverse[t,j]]; y [M,d], weights [N,K] or None for ones; -1 adds nothing."""
    wide = _widen(y)
    out = wide.new_zeros((inverse.shape[0], y.shape[1]))
    padded = torch.cat([wide, wide.new_zeros((1, y.shape[1]))])  # the row that -1 names
    for j in range(inverse.shape[1]):
        there = inverse[:, j] >= 0
        weight = wide.new_ones(inverse.shape[0]) if weights is None else weights[:, j].to(wide.dtype)
        rows = padded.index_select(0, torch.where(there, inverse[:, j], y.shape[0]))
        out = out + torch.where(there, weight, 0)[:, None] * rows
    return out.to(y.dtype)


def _groups(offsets: Tensor, in_sizes: Tensor | None, out_sizes: Tensor | None, features: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Group, its rows, its inputs and its outputs, one after the other."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        ins = features[0] if in_sizes is None else int(in_sizes[e])
        outs = features[1] if out_sizes is None else int(out_sizes[e])
        yield e, slice(begin, end), slice(0, ins), slice(0, outs)
        begin = end


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    in_sizes: Tensor | None = None,
    out_sizes: Tensor | None = None,
) -> Tensor:
    """y[i] = x[i] w[e] + bias[e] for the rows i of group e, which end at offsets[e]; x [R,d], w [E,d,f], bias [E,f].

    A group has in_sizes[e] of the inputs and out_sizes[e] of the outputs; the rest of x and w is not looked at, the
    rest of y is zero, as are rows past the last offset.
    """
    blocks, done = [], 0
    for e, rows, ins, outs in _groups(offsets, in_sizes, out_sizes, (w.shape[1], w.shape[2])):
        block = _widen(x[rows, ins]) @ _widen(w[e, ins, outs])
        if bias is not None:
            block = block + _widen(bias[e, outs])
        blocks.append(torch.nn.functional.pad(block, (0, w.shape[2] - outs.stop)))
        done = rows.stop
    blocks.append(_widen(x).new_zeros((x.shape[0] - done, w.shape[2])))
    return torch.cat(blocks).to(x.dtype)


def grouped_mm_weight_gradient(
    x: Tensor, dy: Tensor, offsets: Tensor, *, in_sizes: Tensor | None = None, out_sizes: Tensor | None = None
) -> Tensor:
    """dw[e] = x_eᵀ dy_e [E,d,f] over the rows of group e; zero beyond its sizes."""
    dw = _widen(x).new_zeros((offsets.shape[0], x.shape[1], dy.shape[1]))
    for e, rows, ins, outs in _groups(offsets, in_sizes, out_sizes, (x.shape[1], dy.shape[1])):
        dw[e, ins, outs] = _widen(x[rows, ins]).mT @ _widen(dy[rows, outs])
    return dw.to(x.dtype)


def activated(gate: Tensor, up: Tensor | None, name: str) -> Tensor:
    """The activation of an expert's gate, times its up value; without one, of the value alone."""
    if name == "swiglu_oai":
        gate = gate.clamp(max=7.0)
        value = gate * torch.sigmoid(1.702 * gate)
        return value if up is None else value * (up.clamp(-7.0, 7.0) + 1)
    if name == "silu":
        value = silu(gate)
    elif name == "gelu":
        value = gelu(gate)
    elif name == "gelu_tanh":
        value = gelu(gate, approximate="tanh")
    else:
        value = gate.relu().square()
    return value if up is None else value * up


def gate_and_up(h: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    """The two halves of h [...,2f], or its even and odd features; h itself where there is no gate."""
    if not gated:
        return h, None
    if interleaved:
        return h[..., ::2], h[..., 1::2]
    gate, up = h.chunk(2, -1)
    return gate, up


def fused_experts(
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
) -> Tensor:
    """out[t] = Σ_j weights[t,j] (a W_downᵀ + b_down), a = act(gate) · up, gate and up = x[t] W_gate_upᵀ + b_gate_up, of
    the expert ids[t,j]; x [N,d], w_gate_up [E,2f,d] (or [E,f,d], no gate), w_down [E,d,f]. -1 adds nothing. Integer
    weights are multiplied by their scale of each output."""
    gated = w_gate_up.shape[1] != w_down.shape[2]
    if activation == "swiglu_oai" and not gated:
        raise ValueError("activation: expected another than swiglu_oai without a gate, got swiglu_oai")
    wide = _widen(x)
    w1 = w_gate_up.to(wide.dtype) * (1 if scale_gate_up is None else scale_gate_up[..., None].to(wide.dtype))
    w2 = w_down.to(wide.dtype) * (1 if scale_down is None else scale_down[..., None].to(wide.dtype))
    out = torch.zeros_like(wide)
    for e in range(w1.shape[0]):
        token, choice = (ids == e).nonzero(as_tuple=True)
        h = wide[token] @ w1[e].mT
        if bias_gate_up is not None:
            h = h + bias_gate_up[e].to(wide.dtype)
        a = activated(*gate_and_up(h, gated, interleaved), activation)
        y = a @ w2[e].mT
        if bias_down is not None:
            y = y + bias_down[e].to(wide.dtype)
        out = out.index_add(0, token, weights[token, choice].to(wide.dtype)[:, None] * y)
    return out.to(x.dtype)


def lora_experts(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    ranks: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """base[t] + Σ_j weights[t,j] b_e a_e x[t], e = ids[t,j]; x [N,d], a [E,r,d], b [E,f,r], of which expert e has
    ranks[e] rows and columns."""
    wide = _widen(x)
    out = wide.new_zeros((x.shape[0], b.shape[1]))
    for e in range(a.shape[0]):
        rank = a.shape[1] if ranks is None else int(ranks[e])
        token, choice = (ids == e).nonzero(as_tuple=True)
        y = wide[token] @ _widen(a[e, :rank]).mT @ _widen(b[e, :, :rank]).mT
        out = out.index_add(0, token, weights[token, choice].to(wide.dtype)[:, None] * y)
    return (out if base is None else _widen(base) + out).to(x.dtype)


def expert_choice_routing(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """weights [E,C], tokens int32 [E,C]: the C tokens of each expert with the largest softmax over experts, ties to
    the lowest token; logits [N,E]."""
    scores = _widen(logits).softmax(-1)
    chosen = [
        sorted(range(logits.shape[0]), key=lambda t: (-column[t], t))[:capacity] for column in scores.t().tolist()
    ]
    tokens = torch.tensor(chosen, device=logits.device).view(-1, capacity)
    return scores.t().gather(1, tokens), tokens.int()


def expert_capacity(tokens: int, k: int, num_experts: int, factor: float) -> int:
    """⌈factor · tokens · k / num_experts⌉."""
    return math.ceil(factor * tokens * k / num_experts)


def limit_capacity(
    ids: Tensor, num_experts: int, capacity: int, *, priority: str = "choice", scores: Tensor | None = None
) -> Tensor:
    """ids [N,K] with -1 where an expert is full: choices queue "choice" by choice, "token" by token, or choice by
    choice with the tokens in descending order of their "score"s [N] or [N,K] (first column)."""
    count, choices = ids.shape
    tokens = list(range(count))
    if scores is not None:
        first = (scores if scores.dim() == 1 else scores[:, 0]).tolist()
        tokens.sort(key=lambda t: -first[t])
    queue = [(t, j) for j in range(choices) for t in tokens]
    if priority == "token":
        queue.sort()
    load, kept = [0] * num_experts, ids.clone()
    for t, j in queue:
        e = int(ids[t, j])
        if e >= 0:
            load[e] += 1
            if load[e] > capacity:
                kept[t, j] = -1
    return kept
