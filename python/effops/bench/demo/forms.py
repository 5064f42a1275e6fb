"""The ways to write a step in eager torch, and which of them is the fastest for the shapes at hand.

Which one wins depends on dtype, GQA ratio and length, so the demo measures them and plain torch gets the best.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.models import ModelConfig

# q [T,H,D], k and v [G,L,D], a bool mask [T,L] or None, causal (T = L, instead of a mask) -> [T, H·D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


def gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """SDPA with its own switch for grouped heads."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[0]
    )
    return out[0].transpose(0, 1).flatten(1)


def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """SDPA over keys and values copied to every query head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[0], 0) for x in (k, v))
    return gqa(q, k, v, mask, causal)


def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """SDPA with the groups as batch and the keys a view of stride 0 over a group's heads."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[0]
    q = q.unflatten(1, (-1, group)).permute(1, 2, 0, 3)
    k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads * dim)


def rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """SDPA of one token with a group's heads as query rows, a view."""
    out = F.scaled_dot_product_attention(q.view(1, k.shape[0], -1, q.shape[2]), k[None], v[None])
    return out.view(1, -1)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Two matmuls around a softmax, a group's heads as rows."""
    tokens, heads, dim = q.shape
    scaled = q.transpose(0, 1).reshape(k.shape[0], -1, dim) * dim**-0.5
    scores = scaled @ k.mT  # [G, H/G·T, L]
    if causal:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
    if mask is not None:
        scores.view(heads, tokens, -1).masked_fill_(~mask, -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return out.view(heads, tokens, dim).transpose(0, 1).reshape(tokens, heads * dim)


ATTENTION: dict[str, Attend] = {
    "SDPA, enable_gqa": gqa,
    "SDPA, heads repeated": repeated,
    "SDPA, groups as batch": expanded,
    "SDPA, group heads as rows": rows,
    "matmul and softmax": matmul,
}
FUSED, SEPARATE = "addmm", "linear, then add"


@dataclass(frozen=True)
class Forms:
    """Attention of a prompt and of a decode step, and how a residual is added to a projection of one row."""

    prefill: str = "SDPA, enable_gqa"
    decode: str = "SDPA, enable_gqa"
    residual: str = SEPARATE

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention [T, H·D] of q [T,H,D] to k, v [G,L,D]: T = L, or one token that sees every key."""
        tokens, length = q.shape[0], k.shape[1]
        if tokens == 1:
            return ATTENTION[self.decode](q, k, v, None, False)
        if window is None or window >= length:
            return ATTENTION[self.prefill](q, k, v, None, True)
        ones = torch.ones(tokens, length, dtype=torch.bool)
        return ATTENTION[self.prefill](q, k, v, ones.tril_() & ones.new_ones(ones.shape).triu_(1 - window), False)

    def add_linear(self, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T,N] + h [T,K] · weight [N,K]ᵀ + bias."""
        if bias is None and self.residual == FUSED:
            return torch.addmm(x, h, weight.t())
        return F.linear(h, weight, bias).add_(x)


@torch.inference_mode()
def fastest(config: ModelConfig, dtype: torch.dtype, prompt: int, context: int) -> tuple[Forms, dict[str, Any]]:
    """The fastest forms for a prompt of ``prompt`` tokens and for a step at ``context`` keys, with all times in µs.

    ``prompt`` 0 leaves the prompt's form as it is by default.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    heads, groups, dim, hidden = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size,
    )  # fmt: skip
    k, v = (random(groups, max(prompt, context) + 1, dim) for _ in range(2))
    q, token = random(prompt, heads, dim), random(1, heads, dim)
    x, h, weight = random(1, hidden), random(1, heads * dim), random(hidden, heads * dim)
    times = {
        "decode": _times(
            {n: partial(a, token, k[:, :context], v[:, :context], None, False) for n, a in ATTENTION.items()}
        ),
        "residual": _times({n: partial(Forms(residual=n).add_linear, x, h, weight, None) for n in (FUSED, SEPARATE)}),
    }
    if prompt:
        times["prefill"] = _times(
            {n: partial(a, q, k[:, :prompt], v[:, :prompt], None, True) for n, a in ATTENTION.items() if a is not rows}
        )
    return Forms(**{part: min(found, key=found.__getitem__) for part, found in times.items()}), times


def _times(calls: dict[str, Callable[[], Tensor]], rounds: int = 7) -> dict[str, float]:
    """The least microseconds of each call, which other work on the machine disturbs least; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    blocks = {}
    for name, call in calls.items():
        call()
        blocks[name] = max(1, int(2e-3 / _seconds(call, 1)))
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_seconds(call, blocks[name]) / blocks[name] * 1e6)
    return {name: min(found) for name, found in samples.items()}


def _seconds(call: Callable[[], Tensor], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin
