"""Drafts of Medusa heads."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference.layer import packed_linear


def medusa_draft(
    hidden: Tensor,
    root: Tensor,
    depths: Tensor,
    ranks: Tensor,
    weight: Tensor,
    bias: Tensor,
    projections: Tensor | None,
    roots: Tensor | None,
    embedding: Tensor | None,
    lm_head: Tensor,
    vocabulary: Tensor | None = None,
) -> Tensor:
    """int64 [B,T]: the root's token, and for a node of depth m and rank r the r-th best (from 0, of equals the first)
    of head m's logits (from 1) over lm_head [V,d] or [K,V,d].

    Head k reads hidden [B,d]: z + silu(W z + b) a layer with weight [layers,K,d,d] and bias [layers,K,d], then P z
    with projections [K,d,d], then + R e with roots [K,d,d] and e the root's row of the embedding. Each step is rounded
    to the dtype. A sequence with a negative root is absent: -1.
    """
    columns = [root]
    for depth, rank in zip(depths.tolist()[1:], ranks.tolist()[1:], strict=True):
        logits = _logits(depth - 1, hidden, root, weight, bias, projections, roots, embedding, lm_head)
        best = logits.sort(dim=-1, descending=True, stable=True).indices[:, rank]
        columns.append(best if vocabulary is None else vocabulary[best])
    return torch.stack(columns, 1).masked_fill(root[:, None] < 0, -1)


def _logits(
    k: int,
    hidden: Tensor,
    root: Tensor,
    weight: Tensor,
    bias: Tensor,
    projections: Tensor | None,
    roots: Tensor | None,
    embedding: Tensor | None,
    lm_head: Tensor,
) -> Tensor:
    z = hidden
    for w, b in zip(weight[:, k], bias[:, k], strict=True):
        wide = z if z.dtype == torch.float64 else z.float()
        inner = wide @ w.to(wide.dtype).mT + b
        z = (wide + torch.nn.functional.silu(inner)).to(z.dtype)
    if projections is not None:
        z = packed_linear(z, projections[k])
    if roots is not None:
        assert embedding is not None
        z = packed_linear(embedding[root.clamp(min=0)], roots[k], residual=z)
    return packed_linear(z, lm_head if lm_head.dim() == 2 else lm_head[k])
