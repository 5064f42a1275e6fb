"""A layer of experts in torch's own operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sort, gather, two ``torch.nn.functional.grouped_mm`` and a sum over the choices, as Transformers does it."""
    slots = ids.flatten()
    order = slots.argsort(stable=True)
    ends = torch.bincount(slots, minlength=len(w_gate_up)).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // ids.shape[1]], w_gate_up.mT, offs=ends)
    gate, up = h.chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, w_down.mT, offs=ends) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return y[back].view(*ids.shape, -1).sum(1).to(x.dtype)


def loop(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Expert by expert, as Transformers' eager experts do it."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w_gate_up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w_down[e])
        out.index_add_(0, token, y * weights[token, choice, None])
    return out.to(x.dtype)
