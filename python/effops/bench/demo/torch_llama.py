"""The other side of the demo: the same weights decoded by plain eager torch, as fast as we can write it.

One sequence, activations [T, d], a preallocated heads-major KV cache [G, L, D] a layer, the fused projections of the
effops model (the very tensors, no copies). No effops op is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.bench.demo.forms import LINEAR, Forms
from effops.models import Llama
from effops.nn import DecoderLayer


class Layer(NamedTuple):
    """One decoder layer's weights, shared with the effops model."""

    window: int | None
    norm1: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm2: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass
class Cache:
    """Keys and values [G, L, D] of every layer; the first ``length`` tokens are filled."""

    k: list[Tensor]
    v: list[Tensor]
    length: int = 0


class TorchLlama:
    """Calling it with whole sequences int64 [1,T] gives logits [1,T,V]; ``forward`` continues a cache."""

    def __init__(self, model: Llama, forms: Forms | None = None) -> None:
        self.config, self.rotary, self.dtype = model.config, model.rotary, model.dtype
        self.forms = forms or Forms()
        self.embedding, self.norm, self.head = (
            p.detach() for p in (model.embed_tokens.weight, model.norm.weight, model.lm_head.weight)
        )
        self.layers = [_layer(cast(DecoderLayer, layer)) for layer in model.layers]
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def new_cache(self, capacity: int) -> Cache:
        c = self.config
        shape = (c.num_hidden_layers, c.num_key_value_heads, capacity, c.head_dim)
        k, v = torch.empty(2, *shape, dtype=self.dtype)
        return Cache(list(k), list(v))

    def __call__(self, tokens: Tensor) -> Tensor:
        if tokens.shape[0] != 1:
            raise ValueError(f"TorchLlama: tokens: expected one sequence, got {tokens.shape[0]}")
        return self.forward(tokens[0], self.new_cache(tokens.shape[1]), last_only=False)[None]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Cache, *, last_only: bool = True) -> Tensor:
        """Logits [T,V], or [1,V] of the last, of tokens int64 [T] that continue the cache: a whole prompt or one."""
        c, count, start = self.config, tokens.shape[0], cache.length
        if start and count > 1:
            raise ValueError(f"TorchLlama: tokens: expected one token beside a filled cache, got {count}")
        end = start + count
        cos, sin = self._rotation(end)
        cos, sin = cos[start:end], sin[start:end]
        x = F.embedding(tokens, self.embedding)
        linear = LINEAR[self.forms.linear if count == 1 else "F.linear"]
        for layer, k_cache, v_cache in zip(self.layers, cache.k, cache.v, strict=True):
            h = F.rms_norm(x, (c.hidden_size,), layer.norm1, c.rms_norm_eps)
            q, k, v = self._heads(linear(h, layer.qkv, layer.qkv_bias, None), layer, cos, sin)
            k_cache[:, start:end].copy_(k.transpose(0, 1))
            v_cache[:, start:end].copy_(v.transpose(0, 1))
            if last_only and layer is self.layers[-1]:  # the other tokens give keys and values only
                q, x, linear = q[-1:], x[-1:], LINEAR[self.forms.linear]
            # A single query needs no mask: the keys before its window are cut off.
            first = max(0, end - layer.window) if layer.window and q.shape[0] == 1 else 0
            h = self.forms.attend(q, k_cache[:, first:end], v_cache[:, first:end], layer.window)
            x = linear(h, layer.out, layer.out_bias, x)
            h = F.rms_norm(x, (c.hidden_size,), layer.norm2, c.rms_norm_eps)
            gate, up = linear(h, layer.gate_up, layer.gate_up_bias, None).chunk(2, -1)
            x = linear(F.silu(gate) * up, layer.down, layer.down_bias, x)
        cache.length = end
        return linear(F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps), self.head, None, None)

    def _heads(self, qkv: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T,H,D] and k [T,G,D], v [T,G,D] of the fused projection."""
        c = self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, c.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(qk[:, :heads], (c.head_dim,), layer.q_norm, c.rms_norm_eps)
            qk = torch.cat((q, F.rms_norm(qk[:, heads:], (c.head_dim,), layer.k_norm, c.rms_norm_eps)), 1)
        half = self.rotary.dim // 2
        if 2 * half == c.head_dim:
            swapped = qk.roll(half, -1)
        else:  # the dimensions after the rotated ones stay: cos is 1 there and sin is 0
            swapped = torch.cat((qk[..., half : 2 * half], qk[..., :half], qk[..., 2 * half :]), -1)
        qk = torch.addcmul(qk * cos, swapped, sin)
        return qk[:, :heads], qk[:, heads:], v

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin [P,1,D] in the model's dtype: x · cos + (x with halves swapped) · sin rotates x."""
        cos, sin = self.rotary.tables(length, torch.device("cpu"))
        if self._tables is None or self._tables[0] is not cos:
            rest = self.config.head_dim - self.rotary.dim
            wide = F.pad(torch.cat((cos, cos), 1), (0, rest), value=1.0)
            signed = F.pad(torch.cat((-sin, sin), 1), (0, rest))
            self._tables = (cos, sin, wide[:, None].to(self.dtype), signed[:, None].to(self.dtype))
        return self._tables[2:]


def _layer(layer: DecoderLayer) -> Layer:
    a, m = layer.self_attn, layer.mlp
    return Layer(
        window=a.window,
        norm1=layer.input_layernorm.weight.detach(),
        qkv=a.qkv_proj.weight.detach(),
        qkv_bias=_detached(a.qkv_proj.bias),
        q_norm=None if a.q_norm is None else a.q_norm.weight.detach(),
        k_norm=None if a.k_norm is None else a.k_norm.weight.detach(),
        out=a.o_proj.weight.detach(),
        out_bias=_detached(a.o_proj.bias),
        norm2=layer.post_attention_layernorm.weight.detach(),
        gate_up=m.gate_up_proj.weight.detach(),
        gate_up_bias=_detached(m.gate_up_proj.bias),
        down=m.down_proj.weight.detach(),
        down_bias=_detached(m.down_proj.bias),
    )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
