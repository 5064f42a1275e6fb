"""FlashInfer's attention over one page a sequence. Written from its documentation, not yet run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from effops.bench.work import Missing

WORKSPACE_BYTES = 256 << 20


class Attention:
    """Attention of q [B,T,H,D] over k, v [B,L,G,D]: causal, or under a mask [T,L] that all sequences share.

    Planned once, as for all layers of a step; a page holds a whole sequence.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        try:
            flashinfer: Any = importlib.import_module("flashinfer")
        except ImportError as error:
            raise Missing(f"flashinfer is not there: {error}") from None
        if not q.is_cuda:
            raise Missing("needs a GPU")
        batch, tokens, heads, dim = q.shape
        length, kv_heads = k.shape[1:3]
        count = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        last = torch.full((batch,), length, dtype=torch.int32, device=q.device)
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        self.q, self.cache, self.shape = q.reshape(-1, heads, dim), (k, v), q.shape
        self.wrapper: Any
        if tokens == 1 and mask is None:
            self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            self.wrapper.plan(count, count[:-1], last, heads, kv_heads, dim, length, data_type=q.dtype)
            return
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        flat = None if mask is None else mask.flatten().repeat(batch)
        self.wrapper.plan(
            count * tokens, count, count[:-1], last, heads, kv_heads, dim, length,
            causal=mask is None, custom_mask=flat, q_data_type=q.dtype,
        )  # fmt: skip

    def __call__(self) -> Tensor:
        out: Tensor = self.wrapper.run(self.q, self.cache)
        return out.view(self.shape)
