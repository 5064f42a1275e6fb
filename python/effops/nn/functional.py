"""The layer functions that the modules call: our fused op, or torch's own where our op does not apply.

Our layer ops have no gradient and no float64 form. So where an input requires grad (and grad mode is on),
or the input is float64, these functions compute the same thing with torch's own operators. The fused linear layer
and the ops of a whole layer are the CPU's: on a device a step is made of its parts, torch's GEMM among them. These
choices are made here and nowhere else; ``effops.ops`` itself never falls back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import _backends, ops

_ON_HOST = _backends.chosen() == "cpu"  # where CPU tensors are computed


def has_fused_layers(x: Tensor) -> bool:
    """Whether ``packed_linear``, ``decoder_layer`` and ``decoder`` serve this tensor."""
    return _ON_HOST and x.is_cpu


def takes_torch_path(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these inputs are computed by torch's own operators (a gradient is needed, or float64)."""
    if x.dtype is torch.float64:
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for t in others)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
) -> Tensor:
    """f(x) · weight [N,K]ᵀ + bias [N] + residual [...,N]; f is the RMSNorm with weight ``norm`` [K], the gated
    activation of x [...,2K], or nothing."""
    if takes_torch_path(x, weight, bias, residual, norm):
        if norm is not None:
            x = rms_norm(x, norm, norm_eps)
        if gated:
            x = silu_mul(x)
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual
    if not has_fused_layers(x):
        x = x if norm is None else ops.rms_norm(x, norm, norm_eps)
        y = F.linear(ops.silu_mul(x) if gated else x, weight, bias)
        return y if residual is None else y + residual
    return ops.packed_linear(x, weight, bias, residual=residual, norm=norm, norm_eps=norm_eps, gated=gated)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x [...,D], statistics in float32 (float64 for float64)."""
    if takes_torch_path(x, weight):
        wide = x if x.dtype is torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return ops.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates the first R dims of x [B,T,H,D]: rows ``positions`` int32 [B,T] of cos, sin float32 [P,R/2]."""
    if takes_torch_path(x):
        half = cos.shape[1]
        c, s = (table[positions].unsqueeze(2).to(x.dtype) for table in (cos, sin))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)
    return ops.rotary(x, cos, sin, positions)


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[..., :f]) · x[..., f:] of x [...,2f]."""
    if takes_torch_path(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return ops.silu_mul(x)
