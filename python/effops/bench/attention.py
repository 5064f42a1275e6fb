"""Attention against the floor and against peers: decode and GEMM-shaped cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.bench.peers import flashinfer, loop, torch_forms, vllm_cpu
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Work, candidate
from effops.reference.bounds import Interval, attention_bound

PEERS = ("sdpa", "sdpa-rows", "matmul", "vllm-cpu")
GPU_PEERS = ("sdpa", "sdpa-rows", "matmul", "flashinfer")


@dataclass(frozen=True)
class Case:
    """Causal attention of the last q_len of kv_len tokens of each sequence."""

    dtype: str = "bfloat16"
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    kv_len: int = 4096

    @property
    def name(self) -> str:
        rows = "decode" if self.q_len == 1 else f"{self.q_len} rows"
        return f"{rows} B={self.batch} H={self.heads} G={self.kv_heads} D={self.head_dim} L={self.kv_len} {self.dtype}"

    @property
    def visible(self) -> int:
        """(query, key) pairs of one head and sequence that the causal mask lets through."""
        return sum(max(0, self.kv_len - self.q_len + i + 1) for i in range(self.q_len))


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        for kv_heads in (32, 8, 4):
            yield Case(dtype, kv_heads=kv_heads)
        yield Case(dtype, batch=1, kv_len=32768)
        yield Case(dtype, batch=4, q_len=256, kv_len=2048)
        yield Case(dtype, batch=1, q_len=64)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(dtype, batch=1, heads=8, kv_heads=2, kv_len=1024)
        yield Case(dtype, batch=1, heads=4, kv_heads=2, q_len=32, kv_len=256)


def work(case: Case, peers: tuple[str, ...], *, loops: bool = False, device: str = "cpu") -> Work:
    """The inputs of a case, copied often enough to outgrow the caches, and everyone who computes it."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:  # heads-major memory
        size = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(size, generator=generator).to(device, dtype).transpose(1, 2)

    kv_bytes = 2 * case.batch * case.kv_len * case.kv_heads * case.head_dim * dtype.itemsize
    copies = max(1, -(-4 * last_level_cache_bytes(device) // max(1, kv_bytes)))
    q = draw(case.q_len, case.heads).contiguous()
    first = draw(case.kv_len, case.kv_heads), draw(case.kv_len, case.kv_heads)
    caches = [first, *(tuple(x.transpose(1, 2).clone().transpose(1, 2) for x in first) for _ in range(copies - 1))]
    mask = torch_forms.bottom_right(case.q_len, case.kv_len)
    mask = mask if mask is None else mask.to(device)
    forms: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "effops": lambda k, v: lambda: ops.attention(q, k, v, causal=True),
        "sdpa": lambda k, v: lambda: torch_forms.sdpa(q, k, v, mask),
        "sdpa-rows": lambda k, v: torch_forms.SdpaRows(q, k, v),
        "matmul": lambda k, v: lambda: torch_forms.matmul(q, k, v, mask),
        "vllm-cpu": lambda k, v: vllm_cpu.Attention(q, k, v),
        "flashinfer": lambda k, v: flashinfer.Attention(q, k, v),
        "loop": lambda k, v: loop.DecodeBf16(q, k, v),
    }
    names = ("effops", *peers, *(["loop"] if loops else []))
    return Work(
        name=case.name,
        fields=asdict(case),
        dtype=dtype,
        bytes=kv_bytes + 2 * q.nbytes,
        flops=4 * case.batch * case.heads * case.visible * case.head_dim,
        copies=copies,
        candidates={name: candidate(forms[name], caches) for name in names},
        check=_checker(case, q, *first),
    )


def _checker(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[str, Tensor], float]:
    """The first and the last (sequence, KV head) with all their rows, against float64."""
    group, corners = case.heads // case.kv_heads, {(0, 0), (case.batch - 1, case.kv_heads - 1)}

    @cache
    def exact(b: int, g: int, rounded_scores: bool) -> Interval:
        own = q[b : b + 1, :, g * group : (g + 1) * group], k[b : b + 1, :, g : g + 1], v[b : b + 1, :, g : g + 1]
        return attention_bound(*(x.cpu() for x in own), causal=True, rounded_scores=rounded_scores)[0]

    def check(name: str, out: Tensor) -> float:
        if out.shape != q.shape or out.dtype != q.dtype:
            return torch.inf
        rounded = name not in ("effops", "loop")
        rows = {(b, g): out[b : b + 1, :, g * group : (g + 1) * group] for b, g in corners}
        return max(exact(b, g, rounded).worst(part.cpu()) for (b, g), part in rows.items())

    return check
