"""The expert layer of training: tokens sorted by expert, one matrix product an expert, one op for torch.compile.

Groups are padded with zero rows to a multiple of ROWS, so that the products have few distinct shapes: the library
that computes them prepares every new shape anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64


class _Rows:
    """Where each slot (token, choice) lies among the padded rows, and where each expert's rows are."""

    def __init__(self, ids: Tensor, experts: int) -> None:
        tokens, choices = ids.shape
        flat = ids.flatten()
        counts = torch.bincount(flat, minlength=experts)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        self.order = flat.argsort(stable=True)
        self.rows = torch.arange(tokens * choices) + shift[flat[self.order]]
        self.place = torch.empty_like(self.rows)
        self.place[self.order] = self.rows
        self.token = self.order // choices
        self.size = tokens * choices + experts * ROWS
        ends = padded.cumsum(0).tolist()
        self.groups = list(enumerate(zip([0, *ends[:-1]], ends, strict=True)))

    def spread(self, x: Tensor) -> Tensor:
        """x [N,d] to rows [size,d]; zero between."""
        out = x.new_zeros(self.size, x.shape[1])
        out[self.rows] = x[self.token]
        return out

    def spread_weights(self, weights: Tensor) -> Tensor:
        """weights [N,K] to [size,1]; zero between."""
        out = weights.new_zeros(self.size, 1)
        out[self.rows, 0] = weights.flatten()[self.order]
        return out

    def gather(self, rows: Tensor, tokens: int) -> Tensor:
        """The sum of each token's rows [size,d], [N,d]."""
        return rows[self.place].view(tokens, -1, rows.shape[1]).sum(1)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left [size,a] times each expert's right [E,a,b]."""
        out = left.new_empty(self.size, right.shape[2])
        for e, (begin, end) in self.groups:
            torch.mm(left[begin:end], right[e], out=out[begin:end])
        return out

    def weight_products(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ right of each expert's rows, [E,a,b]."""
        out = left.new_empty(len(self.groups), left.shape[1], right.shape[1])
        for e, (begin, end) in self.groups:
            torch.mm(left[begin:end].T, right[begin:end], out=out[e])
        return out


@torch.compile(dynamic=False)
def _gated(hidden: Tensor, weights: Tensor) -> Tensor:
    gate, up = hidden.float().chunk(2, -1)
    return (F.silu(gate) * up * weights).to(hidden.dtype)


@torch.compile(dynamic=False)
def _gated_backward(hidden: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden values and of the weights, and the gated values again."""
    gate, up = hidden.float().chunk(2, -1)
    share, grad = gate.sigmoid(), grad.float()
    act = gate * share
    d_weights = (grad * act * up).sum(-1, keepdim=True)
    grad = grad * weights
    d_gate = grad * up * share * (1 + gate * (1 - share))
    d_hidden = torch.cat([d_gate, grad * act], -1).to(hidden.dtype)
    return d_hidden, d_weights, (act * up * weights).to(hidden.dtype)


@torch.library.custom_op("train_moe::experts", mutates_args=())
def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """x [N,d], gate_up [E,2f,d], down [E,d,f], weights f32 [N,K], ids [N,K] to (out [N,d], hidden rows)."""
    rows = _Rows(ids, len(gate_up))
    hidden = rows.products(rows.spread(x), gate_up.mT)
    gated = _gated(hidden, rows.spread_weights(weights))  # down is linear: weights may come before it
    return rows.gather(rows.products(gated, down.mT), len(x)), hidden


@experts.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    rows = ids.numel() + len(gate_up) * ROWS
    return torch.empty_like(x), x.new_empty(rows, gate_up.shape[1])


@torch.library.custom_op("train_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, hidden: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weights."""
    rows = _Rows(ids, len(gate_up))
    d_out, spread = rows.spread(grad), rows.spread_weights(weights)
    d_hidden, d_weights, gated = _gated_backward(hidden, spread, rows.products(d_out, down))
    dx = rows.gather(rows.products(d_hidden, gate_up), len(x))
    d_gate_up = rows.weight_products(d_hidden, rows.spread(x))
    return dx, d_gate_up, rows.weight_products(d_out, gated), d_weights[rows.place].view_as(weights)


@experts_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(map(torch.empty_like, (x, gate_up, down, weights)))  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    return *experts_backward(grad.contiguous(), *ctx.saved_tensors), None


experts.register_autograd(_backward, setup_context=_setup_context)


def sorted_experts_forward(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls for ``experts_implementation="sorted"``; bf16 products under autocast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    gate_up, down = module.gate_up_proj.to(dtype), module.down_proj.to(dtype)
    return experts(x.to(dtype), gate_up, down, weights.float(), ids)[0].to(x.dtype)
