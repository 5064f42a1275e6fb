"""The modules: both paths of each layer function agree, gradients flow, attention is its parts."""

from __future__ import annotations

import pytest
import torch
from effops import reference
from effops.cache import DenseKVCache
from effops.nn import MLP, Attention, DecoderLayer, Linear, RMSNorm, Rope, functional
from torch import nn

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3, generator=generator)
    return module


def rope(batch, tokens, dim):
    angles = torch.arange(32)[:, None] * torch.linspace(1, 0.01, dim // 2)
    return Rope(angles.cos(), angles.sin(), torch.arange(tokens, dtype=torch.int32).expand(batch, -1))


CALLS = {
    "linear": lambda x: functional.linear(x, torch.linspace(-1, 1, 96).view(6, 16), torch.ones(6)),
    "linear-residual": lambda x: functional.linear(x, torch.linspace(-1, 1, 256).view(16, 16), None, x),
    "rms_norm": lambda x: functional.rms_norm(x, torch.linspace(0.5, 2, 16), 1e-5),
    "rotary": lambda x: functional.rotary(x.view(2, 3, 2, 8), *rope(2, 3, 6)),
    "silu_mul": functional.silu_mul,
}


@pytest.mark.parametrize("name", CALLS)
def test_both_paths_agree(name):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    assert not functional.takes_torch_path(x) and functional.takes_torch_path(x.clone().requires_grad_())
    fused = CALLS[name](x)
    differentiable = CALLS[name](x.clone().requires_grad_())
    torch.testing.assert_close(fused, differentiable.detach(), **TOLERANCE)
    assert differentiable.requires_grad and not fused.requires_grad
    with torch.no_grad():
        assert torch.equal(CALLS[name](x.clone().requires_grad_()), fused)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_the_torch_path(name):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tables = {"rtol": 1e-3, "atol": 1e-5} if name == "rotary" else {}
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.autograd.gradcheck(CALLS[name], x.requires_grad_(), **tables)
    finally:
        torch.set_default_dtype(torch.float32)


def test_linear_equals_torch_and_shares_nothing_hidden():
    ours = filled(Linear(12, 5, bias=True))
    theirs = nn.Linear(12, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
        ours.weight.mul_(2)  # a weight changed in place is the one used
        torch.testing.assert_close(ours(x), 2 * theirs(x) - theirs.bias, **TOLERANCE)
        ours.weight = nn.Parameter(torch.zeros(5, 12))
        torch.testing.assert_close(ours(x), theirs.bias.expand(4, 5), **TOLERANCE)


def test_rms_norm_and_mlp():
    norm, mlp = filled(RMSNorm(12, 1e-3)), filled(MLP(12, 20, bias=True))
    x = torch.randn(4, 12)
    with torch.no_grad():
        expected = nn.functional.rms_norm(x, (12,), norm.weight, 1e-3)
        torch.testing.assert_close(norm(x), expected, **TOLERANCE)
        gate, up = nn.functional.linear(x, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias).chunk(2, -1)
        down = mlp.down_proj
        expected = nn.functional.linear(nn.functional.silu(gate) * up, down.weight, down.bias) + x
        torch.testing.assert_close(mlp(x, x), expected, **TOLERANCE)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("window, norms", [(None, False), (3, True)])
def test_attention_is_its_parts(grad, window, norms):
    batch, tokens, heads, kv_heads, dim = 2, 7, 4, 2, 8
    layer = filled(
        Attention(
            24,
            heads,
            kv_heads,
            dim,
            bias=True,
            out_bias=True,
            qk_norm_eps=1e-5 if norms else None,
            window=window,
        )
    )
    x, turn = torch.randn(batch, tokens, 24), rope(batch, tokens, dim)
    with torch.set_grad_enabled(grad):
        out = layer(x, turn, residual=x)
    assert out.requires_grad == grad
    with torch.no_grad():
        projected = nn.functional.linear(x, layer.qkv_proj.weight, layer.qkv_proj.bias)
        q, k, v = projected.view(batch, tokens, 8, dim).split([heads, kv_heads, kv_heads], 2)
        if norms:
            q = reference.rms_norm(q, layer.q_norm.weight, 1e-5)
            k = reference.rms_norm(k, layer.k_norm.weight, 1e-5)
        q, k = (reference.rotary(t, *turn) for t in (q, k))
        mixed = reference.attention(q, k, v, causal=True, window=window).flatten(2)
        expected = nn.functional.linear(mixed, layer.o_proj.weight, layer.o_proj.bias) + x
    torch.testing.assert_close(out.detach(), expected, **TOLERANCE)


def test_attention_refuses_uneven_heads():
    with pytest.raises(ValueError, match=r"num_heads: expected a multiple of num_kv_heads \(3\), got 4"):
        Attention(24, 4, 3, 8)


def decoder_layer(**options):
    attention = Attention(24, 4, 2, 8, bias=True, window=5, **options)
    return filled(DecoderLayer(attention, MLP(24, 20), RMSNorm(24), RMSNorm(24)))


def steps_of(layer, *counts):
    """The outputs of steps of so many tokens over one cache."""
    cache, outputs = DenseKVCache(1, 2, 32, 2, 8), []
    for i, count in enumerate(counts):
        step = cache.plan(count)
        x = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(i))
        outputs.append(layer(x, Rope(*rope(2, count, 8)[:2], step.positions), cache.layers[0], step))
        cache.advance(step)
    return outputs


@torch.no_grad()
def test_one_call_has_the_bits_of_the_modules(monkeypatch):
    layer, calls = decoder_layer(), []
    fused = DecoderLayer._weights
    monkeypatch.setattr(DecoderLayer, "_weights", lambda self: calls.append(fused(self)) or calls[-1])
    whole = steps_of(layer, 3, 1, 20, 1)
    assert len(calls) == 4 and all(c is not None for c in calls)
    monkeypatch.setattr(DecoderLayer, "_weights", lambda self: None)
    assert all(torch.equal(a, b) for a, b in zip(whole, steps_of(layer, 3, 1, 20, 1), strict=True))


@torch.no_grad()
def test_replaced_parts_are_used():
    """A layer with another module in it, or steps that the op does not have, goes through its modules."""

    class Doubled(Linear):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    layer = decoder_layer()
    (plain,) = steps_of(layer, 3)
    layer.self_attn.o_proj.__class__ = Doubled
    assert layer._weights() is None and not torch.allclose(steps_of(layer, 3)[0], plain)
    assert decoder_layer(qk_norm_eps=1e-5)._weights() is None
    layer = decoder_layer()
    layer.mlp = nn.Identity()
    assert layer._weights() is None
