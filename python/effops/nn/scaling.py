"""Activation-aware scaling before quantisation (AWQ, arXiv 2306.00978): inputs of a linear layer that are large get
finer steps, since their columns are multiplied by s before they are rounded, and what gives the inputs is divided by s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effops.nn import functional
from effops.nn.attention import Attention
from effops.nn.basic import MLP, Linear, RMSNorm
from effops.nn.decoder import DecoderLayer

EXPONENTS = tuple(i / 10 for i in range(11))  # s = (mean |x|)^a: which a is chosen by the error of the outputs
SAMPLES = 512  # rows of inputs, at least, that errors are measured on

Round = Callable[[Tensor], Tensor]  # a weight to what quantisation leaves of it
Free = Callable[..., bool]  # may this layer be scaled, and these that it takes part with be written?


class _Recorder(nn.Module):
    """In a linear layer's place: it adds up the sizes of its inputs and keeps some."""

    def __init__(self, inner: Linear, every: int) -> None:
        super().__init__()
        self.inner, self.every, self.seen = inner, every, 0
        self.sizes = torch.zeros(inner.weight.shape[1], device=inner.weight.device)
        self.rows: list[Tensor] = []

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None, gated: bool = False
    ) -> Tensor:
        before = x if norm is None else norm.forward(x)
        before = functional.silu_mul(before) if gated else before
        rows = before.flatten(0, -2).float()
        self.sizes += rows.abs().sum(0)
        self.rows.append(rows[-self.seen % self.every :: self.every].clone())
        self.seen += len(rows)
        return self.inner.forward(x, residual, norm, gated)


@contextmanager
def _recording(layers: Sequence[DecoderLayer], every: int) -> Iterator[list[dict[str, _Recorder]]]:
    """The recorders of each layer's four projections, which are back in their places afterwards."""
    places = [
        (own, name) for layer in layers for own in (layer.self_attn, layer.mlp) for name in own._modules
        if name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ]  # fmt: skip
    recorders = [_Recorder(own._modules[name], every) for own, name in places]
    try:
        for (own, name), recorder in zip(places, recorders, strict=True):
            own._modules[name] = recorder
        named = [{name: r for (own, name), r in zip(places, recorders, strict=True)
                  if own in (layer.self_attn, layer.mlp)} for layer in layers]  # fmt: skip
        yield named
    finally:
        for (own, name), recorder in zip(places, recorders, strict=True):
            own._modules[name] = recorder.inner


@torch.no_grad()
def scale_(model: nn.Module, tokens: Tensor, rounded: Round, wanted: Callable[[Linear], bool]) -> int:
    """Scales the inputs of the projections of every plain :class:`DecoderLayer`, by what ``model(tokens)`` gives them,
    so that ``rounded`` weights change their outputs least. The model computes what it did: scales go into the norm
    before a layer, the values before the output projection, and the up projection before the down projection.

    Args:
        tokens: int64 [N,T], text that the model will see the like of.
        wanted: whether a layer will be rounded.

    Returns:
        How many layers' inputs were scaled.
    """
    layers = [m for m in model.modules() if type(m) is DecoderLayer and _is_plain(m)]
    every = max(1, tokens.numel() // SAMPLES)
    if every % 2 == 0:
        every += 1  # samples go through the positions of sequences whose length is a power of two
    shared = _shared(model)

    def free(linear: Linear, *others: Any) -> bool:
        """Will it be rounded, and does nothing else read what is written?"""
        tensors = (t for m in (linear, *others) for t in m._parameters.values() if t is not None)
        return wanted(linear) and not any(id(t) in shared for t in tensors)

    with _recording(layers, every) as recorders:
        for row in tokens.split(1):
            model(row)
    count = 0
    for layer, seen in zip(layers, recorders, strict=True):
        for fold in (_down, _o, _qkv, _gate_up):  # those whose inputs come from another's rows first
            count += fold(layer, seen, rounded, free)
    return count


def _shared(model: nn.Module) -> set[int]:
    """Parameters, by id, that are in more than one place of the model, be it with their module."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        for t in module._parameters.values():
            if t is not None:
                (twice if id(t) in seen else seen).add(id(t))
    return twice


def _is_plain(layer: DecoderLayer) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not Attention or type(mlp) is not MLP or attention.clip is not None:
        return False
    projections = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    return all(type(p) is Linear for p in projections)


def _down(layer: DecoderLayer, seen: dict[str, _Recorder], rounded: Round, free: Free) -> int:
    down, gate_up = layer.mlp.down_proj, layer.mlp.gate_up_proj
    if not free(down, gate_up):
        return 0
    s = _scales(down.weight, seen["down_proj"], rounded)
    down.weight.mul_(s)
    for t in (gate_up.weight, gate_up.bias):
        if t is not None:
            half = t[t.shape[0] // 2 :]  # up values
            half.div_(s[:, None] if t.dim() == 2 else s)
    return 1


def _o(layer: DecoderLayer, seen: dict[str, _Recorder], rounded: Round, free: Free) -> int:
    """Query heads of a KV head share their scales, which are those of its values."""
    attention: Any = layer.self_attn
    o, qkv = attention.o_proj, attention.qkv_proj
    if not free(o, qkv):
        return 0
    kv_heads, dim = attention.num_kv_heads, attention.head_dim

    def shared(x: Tensor) -> Tensor:
        by_head = x.view(kv_heads, -1, dim)
        return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()

    s = _scales(o.weight, seen["o_proj"], rounded, shared)
    o.weight.mul_(s)
    of_values = s.view(kv_heads, -1, dim)[:, 0].flatten()
    for t in (qkv.weight, qkv.bias):
        if t is not None:
            t[-kv_heads * dim :].div_(of_values[:, None] if t.dim() == 2 else of_values)
    return 1


def _qkv(layer: DecoderLayer, seen: dict[str, _Recorder], rounded: Round, free: Free) -> int:
    return _norm(layer.input_layernorm, layer.self_attn.qkv_proj, seen["qkv_proj"], rounded, free)


def _gate_up(layer: DecoderLayer, seen: dict[str, _Recorder], rounded: Round, free: Free) -> int:
    return _norm(layer.post_attention_layernorm, layer.mlp.gate_up_proj, seen["gate_up_proj"], rounded, free)


def _norm(norm: Any, linear: Any, seen: _Recorder, rounded: Round, free: Free) -> int:
    if type(norm) is not RMSNorm or not free(linear, norm):
        return 0
    s = _scales(linear.weight, seen, rounded)
    linear.weight.mul_(s)
    norm.weight.div_(s)
    return 1


def _scales(
    weight: Tensor, seen: _Recorder, rounded: Round, shared: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The s [K] of the least error of x W^T; 1 where nothing helps."""
    x, w = torch.cat(seen.rows), weight.float()
    sizes = seen.sizes if shared is None else shared(seen.sizes)
    exact, best, least = x @ w.T, torch.ones_like(sizes), torch.inf
    for exponent in EXPONENTS:
        s = (sizes / sizes.mean().clamp(min=1e-30)).clamp(min=1e-4) ** exponent
        s = s / (s.amax() * s.amin()).sqrt()
        error = float((x @ (rounded(w * s) / s).T - exact).square().sum())
        if error < least:
            best, least = s, error
    return best.to(weight.dtype)
