"""Decoding of a batch that shares a prefix, against the floor, the same batch without sharing, and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effops import ops
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Other, Work, candidate, in_cache
from effops.reference.bounds import attention_bound

OWN = ("effops", "shared", "paged")
PEERS = ("sdpa", "matmul")
PAGE = 64  # tokens, of the batch without sharing


@dataclass(frozen=True)
class Case:
    """One query token for each of batch sequences, of shared_len keys that all have and kv_len of its own."""

    dtype: str = "bfloat16"
    batch: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    shared_len: int = 8192
    kv_len: int = 128

    @property
    def name(self) -> str:
        sizes = f"H={self.heads} G={self.kv_heads} D={self.head_dim}"
        return f"{self.batch} x ({self.shared_len} shared + {self.kv_len}) {sizes} {self.dtype}"


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """The headline; prefixes of 1K and 16K; batches of 4, 8 and 128; one head a KV head; long own parts."""
    for dtype in dtypes:
        yield Case(dtype)
        yield Case(dtype, shared_len=1024)
        yield Case(dtype, shared_len=16384)
        yield Case(dtype, batch=4)
        yield Case(dtype, batch=8)
        yield Case(dtype, batch=128, shared_len=2048)
        yield Case(dtype, heads=8)
        yield Case(dtype, batch=16, kv_len=1024)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(dtype, batch=8, heads=4, kv_heads=2, head_dim=32, shared_len=512, kv_len=40)
        yield Case(dtype, batch=3, heads=4, kv_heads=4, head_dim=32, shared_len=128, kv_len=200)


@dataclass
class _Inputs:
    """q [B,H,D]; the prefix [1,L,G,D] and each sequence's own keys and values [B,l,G,D], heads-major in memory."""

    q: Tensor
    shared: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


def _levels(x: _Inputs) -> list[ops.KVLevel]:
    batch = x.q.shape[0]
    prefix, own = x.shared[0].shape[1], x.own[0].shape[1]
    return [
        ops.KVLevel(*x.shared, torch.tensor([prefix], dtype=torch.int32), torch.tensor([0, batch], dtype=torch.int32)),
        ops.KVLevel(
            *x.own, torch.full((batch,), own, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)
        ),
    ]  # fmt: skip


class _Paged:
    """paged_attention of every sequence over all its keys: pages of the prefix are stored once and read by each."""

    def __init__(self, x: _Inputs) -> None:
        batch, prefix, own = x.q.shape[0], x.shared[0].shape[1], x.own[0].shape[1]
        if prefix % PAGE:
            raise ValueError(f"cascade: shared_len: expected a multiple of {PAGE} for whole pages, got {prefix}")
        entries = -(-own // PAGE)
        first = prefix // PAGE + entries * torch.arange(batch)[:, None]
        mine = first + torch.arange(entries)
        self.table = torch.cat([torch.arange(prefix // PAGE).expand(batch, -1), mine], 1).int()
        self.lens = torch.full((batch,), prefix + own, dtype=torch.int32)
        self.q = x.q[:, None]
        self.k, self.v = (self._pages(a, b, entries) for a, b in zip(x.shared, x.own, strict=True))

    @staticmethod
    def _pages(shared: Tensor, own: Tensor, entries: int) -> Tensor:
        padded = torch.nn.functional.pad(own, (0, 0, 0, 0, 0, entries * PAGE - own.shape[1]))
        pages = [x.unflatten(1, (-1, PAGE)).flatten(0, 1) for x in (shared, padded)]
        return in_cache(torch.cat(pages))

    def __call__(self) -> Tensor:
        out = ops.paged_attention(self.q, self.k, self.v, self.table, self.lens)
        assert isinstance(out, Tensor)
        return out[:, 0]


class _Sdpa:
    """Hydragen by torch's flash attention: the batch's rows against the prefix, each sequence's against its own keys,
    joined by log-sum-exp."""

    def __init__(self, x: _Inputs) -> None:
        batch, heads, dim = x.q.shape
        kv_heads = x.own[0].shape[2]
        rows = x.q.view(batch, kv_heads, -1, dim)
        self.rows, self.shape = rows, (batch, heads, dim)
        self.prefix_rows = rows.transpose(0, 1).reshape(1, kv_heads, -1, dim)
        self.shared, self.own = ([t.transpose(1, 2) for t in pair] for pair in (x.shared, x.own))

    def __call__(self) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        kv_heads, group = self.rows.shape[1:3]
        a, a_lse = attend(self.prefix_rows, *self.shared)
        b, b_lse = attend(self.rows, *self.own)
        a, a_lse = (t[0].view(kv_heads, -1, group, *t.shape[3:]).transpose(0, 1) for t in (a, a_lse))
        weight = torch.sigmoid(a_lse - b_lse)[..., None]
        return (a * weight + b * (1 - weight)).to(b.dtype).reshape(self.shape)


class _Matmul(_Sdpa):
    """The same by products and a softmax of both parts at once."""

    def __call__(self) -> Tensor:
        kv_heads, group, dim = self.rows.shape[1:]
        batch, prefix = self.rows.shape[0], self.shared[0].shape[2]
        scores = (self.prefix_rows @ self.shared[0].mT)[0].view(kv_heads, batch, group, -1).transpose(0, 1)
        own = self.rows @ self.own[0].mT
        p = torch.softmax(torch.cat([scores, own], -1) * dim**-0.5, -1, dtype=torch.float32).to(own.dtype)
        shared = p[..., :prefix].transpose(0, 1).reshape(1, kv_heads, -1, prefix) @ self.shared[1]
        parts = shared[0].view(kv_heads, batch, group, dim).transpose(0, 1)
        return (parts + p[..., prefix:] @ self.own[1]).reshape(self.shape)


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """The inputs of a case, copied until they outgrow the caches, and everyone who computes it or its like.

    Own values are as much larger as the prefix is longer, so that either part's weight shows in the result.
    """
    dtype, generator = getattr(torch, case.dtype), torch.Generator().manual_seed(0)

    def draw(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        size = (batch, case.kv_heads, tokens, case.head_dim)
        k, v = (in_cache(torch.randn(size, generator=generator).to(dtype).transpose(1, 2)) for _ in range(2))
        return k, v

    first = draw(1, case.shared_len), draw(case.batch, case.kv_len)
    first[1][1].mul_(min(1024, max(1, case.shared_len // case.kv_len)))
    kv_bytes = sum(x.nbytes for pair in first for x in pair)
    copies = max(1, -(-4 * last_level_cache_bytes() // kv_bytes))
    inputs = []
    for i in range(copies):
        q = torch.randn(case.batch, case.heads, case.head_dim, generator=generator).to(dtype)
        prefix, own = first if i == 0 else (_copied(pair) for pair in first)
        inputs.append(_Inputs(q, prefix, own))

    def whole(x: _Inputs) -> Callable[[], Any]:
        levels = _levels(x)
        return lambda: ops.cascade_attention(x.q, levels, causal=True)

    def shared(x: _Inputs) -> Callable[[], Any]:
        levels = _levels(x)[:1]
        return lambda: ops.cascade_attention(x.q, levels)

    forms: dict[str, Callable[[_Inputs], Callable[[], Any]]] = {
        "effops": whole, "shared": shared, "paged": _Paged, "sdpa": _Sdpa, "matmul": _Matmul,
    }  # fmt: skip
    pair, ends = 4 * case.batch * case.heads * case.head_dim, 2 * inputs[0].q.nbytes
    prefix_bytes = sum(x.nbytes for x in first[0])
    names = (*OWN, *peers)
    return Work(
        name=case.name,
        fields=asdict(case),
        dtype=dtype,
        bytes=kv_bytes + ends,
        flops=pair * (case.shared_len + case.kv_len),
        copies=copies,
        candidates={name: candidate(forms[name], [(x,) for x in inputs]) for name in names},
        check=_checker(case, inputs[0]),
        others={"shared": Other("the prefix alone", prefix_bytes + ends, pair * case.shared_len)},
    )


def _copied(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    k, v = (in_cache(x) for x in pair)
    return k, v


def _checker(case: Case, x: _Inputs) -> Callable[[str, Tensor], float]:
    """The first and the last (sequence, KV head), over the keys in line, in float64."""
    group, corners = case.heads // case.kv_heads, {(0, 0), (case.batch - 1, case.kv_heads - 1)}

    @cache
    def exact(name: str, b: int, g: int) -> Any:
        heads = slice(g * group, (g + 1) * group)
        parts = [[shared[:, :, g : g + 1], own[b : b + 1, :, g : g + 1]]
                 for shared, own in zip(x.shared, x.own, strict=True)]  # fmt: skip
        k, v = (torch.cat(p[:1] if name == "shared" else p, 1) for p in parts)
        rounded = name not in OWN
        return attention_bound(x.q[b : b + 1, None, heads], k, v, rounded_scores=rounded)[0]

    def check(name: str, out: Tensor) -> float:
        if out.shape != x.q.shape or out.dtype != x.q.dtype:
            return torch.inf
        # Two more roundings of parts to the dtype where they are joined in it.
        slack = 1 if name in OWN else 3
        parts = {(b, g): out[b : b + 1, None, g * group : (g + 1) * group] for b, g in corners}
        return max(exact(name, b, g).worst(part) / slack for (b, g), part in parts.items())

    return check
