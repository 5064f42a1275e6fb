"""Plain torch: the forms in which one would write the same attention, and the linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effops.bench.work import Missing


def bottom_right(q_len: int, kv_len: int) -> Tensor | None:
    """The causal mask of the last q_len of kv_len tokens, bool [T,L]; None where it hides nothing."""
    if q_len == 1:
        return None
    return torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention with enable_gqa: [B,T,H,D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class SdpaRows:
    """scaled_dot_product_attention with the heads of a group as rows: q [B,1,H,D] as [B,G,H/G,D], a view."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if q.shape[1] != 1:
            raise Missing("needs one query a sequence")
        self.rows = q.view(q.shape[0], k.shape[2], -1, q.shape[-1])
        self.k, self.v, self.shape = k.transpose(1, 2), v.transpose(1, 2), q.shape

    def __call__(self) -> Tensor:
        return F.scaled_dot_product_attention(self.rows, self.k, self.v).reshape(self.shape)


class SdpaMaskRows:
    """scaled_dot_product_attention with the heads of a group as rows of a masked call; the mask [T,L] is repeated once,
    q and the result are permuted in every call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        self.group = q.shape[2] // k.shape[2]
        if self.group == 1:
            raise Missing("one head a KV head: the same as sdpa-mask")
        self.q, self.k, self.v = q, k.transpose(1, 2), v.transpose(1, 2)
        self.mask = mask.repeat(self.group, 1)

    def __call__(self) -> Tensor:
        batch, tokens, _, dim = self.q.shape
        rows = self.q.view(batch, tokens, -1, self.group, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(rows, self.k, self.v, self.mask)
        return out.unflatten(2, (self.group, tokens)).permute(0, 3, 1, 2, 4).reshape(self.q.shape)


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Two matmuls around a float32 softmax; the heads of a group are rows where that is a view."""
    k, v, scale = k.transpose(1, 2), v.transpose(1, 2), q.shape[-1] ** -0.5
    batch, tokens, _, dim = q.shape
    if tokens == 1:
        p = torch.softmax((q.view(batch, k.shape[1], -1, dim) @ k.mT) * scale, -1, dtype=torch.float32)
        return (p.to(v.dtype) @ v).reshape(q.shape)
    rows = q.view(batch, tokens, k.shape[1], -1, dim).permute(0, 2, 3, 1, 4)  # [B,G,H/G,T,D]
    scores = (rows @ k[:, :, None].mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v[:, :, None]
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape)
