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

from effops.models import Llama

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


def group_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
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
    "SDPA, group heads as rows": group_rows,
    "matmul and softmax": matmul,
}
BLOCKS = 8  # of weight rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """F.linear, then the addition in place."""
    y = F.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def addmm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The residual, where there is one and no bias, added by the product itself."""
    if residual is None or bias is not None:
        return linear(x, weight, bias, residual)
    return torch.addmm(residual, x, weight.t())


def row_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A batch of products over blocks of weight rows: threads share a matrix-vector product that is else serial."""
    if x.shape[0] > 1 or weight.shape[0] % BLOCKS:
        return linear(x, weight, bias, residual)
    column = x.t().expand(BLOCKS, -1, 1)
    y = torch.bmm(weight.view(BLOCKS, -1, weight.shape[1]), column).view(1, -1)
    y = y if bias is None else y.add_(bias)
    return y if residual is None else y.add_(residual)


# x [T,K], weight [N,K], bias [N] or None, residual [T,N] or None -> [T,N]
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
LINEAR: dict[str, Linear] = {
    "F.linear": linear,
    "F.linear, addmm for residuals": addmm,
    "bmm over row blocks": row_blocks,
}


@dataclass(frozen=True)
class Forms:
    """Names of the forms: attention of a prompt and of a decode step, and the linear layers of a decode step."""

    prefill: str = "SDPA, enable_gqa"
    decode: str = "SDPA, enable_gqa"
    linear: str = "F.linear"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention [T, H·D] of q [T,H,D] to k, v [G,L,D]: T = L, or one token that sees every key."""
        tokens, length = q.shape[0], k.shape[1]
        if tokens == 1:
            return ATTENTION[self.decode](q, k, v, None, False)
        if window is None or window >= length:
            return ATTENTION[self.prefill](q, k, v, None, True)
        ones = torch.ones(tokens, length, dtype=torch.bool)
        return ATTENTION[self.prefill](q, k, v, ones.tril().triu(1 - window), False)


@torch.inference_mode()
def fastest(model: Llama, prompt: int, context: int) -> tuple[Forms, dict[str, Any]]:
    """The fastest forms for a prompt of ``prompt`` tokens and for a step at ``context`` keys, with all times in µs.

    ``prompt`` 0 leaves the prompt's form as it is by default. Linear layers are timed over all of the model's weights
    one after the other, as a step reads them, because a single weight would stay in the cache.
    """
    c, generator = model.config, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    k, v = (random(c.num_key_value_heads, max(prompt, context) + 1, c.head_dim) for _ in range(2))
    q, token = random(prompt, c.num_attention_heads, c.head_dim), random(1, c.num_attention_heads, c.head_dim)
    weights = [w.detach() for n, w in model.named_parameters() if n.endswith("_proj.weight")] + [model.lm_head.weight]
    rows = {size: random(1, size) for size in {w.shape[1] for w in weights}}
    added = [random(1, w.shape[0]) if w.shape[0] == c.hidden_size else None for w in weights]

    def all_linear(form: Linear) -> None:
        for w, residual in zip(weights, added, strict=True):
            form(rows[w.shape[1]], w, None, residual)

    times = {
        "decode": _times(
            {n: partial(a, token, k[:, :context], v[:, :context], None, False) for n, a in ATTENTION.items()}
        ),
        "linear": _times({n: partial(all_linear, form) for n, form in LINEAR.items()}),
    }
    if prompt:
        whole = {n: a for n, a in ATTENTION.items() if a is not group_rows}
        times["prefill"] = _times(
            {n: partial(a, q, k[:, :prompt], v[:, :prompt], None, True) for n, a in whole.items()}
        )
    return Forms(**{part: min(found, key=found.__getitem__) for part, found in times.items()}), times


def _times(calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
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


def _seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin
