"""A decode step over retrieval and streaming heads, against the floor, all heads over all tokens, and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ops
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Other, Work, candidate, in_cache
from effops.cache import DuoKVCache
from effops.reference.bounds import attention_bound

OWN = ("effops", "masked", "dense")
PEERS = ("sdpa",)


@dataclass(frozen=True)
class Case:
    """One query token a sequence: full of the KV heads over kv_len tokens, the others over sinks and recent ones."""

    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kv_len: int = 32768
    full: int = 4
    sinks: int = 64
    recent: int = 256

    @property
    def name(self) -> str:
        sizes = f"B={self.batch} H={self.heads} G={self.kv_heads} D={self.head_dim} L={self.kv_len}"
        return f"{self.full} of {self.kv_heads} KV heads full, {self.sinks} + {self.recent} {sizes} {self.dtype}"


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """Half of the heads, a quarter, none; one head a KV head; a batch."""
    for dtype in dtypes:
        yield Case(dtype)
        yield Case(dtype, full=2)
        yield Case(dtype, full=0, batch=16, kv_len=4096)
        yield Case(dtype, heads=8)
        yield Case(dtype, batch=8, kv_len=4096)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(dtype, heads=4, kv_heads=2, head_dim=32, kv_len=1000, full=1, sinks=4, recent=60)
        yield Case(dtype, batch=2, heads=4, kv_heads=2, head_dim=32, kv_len=500, full=0, sinks=20, recent=30)


class _Rings:
    """One layer of a DuoKVCache that holds the tokens; every second KV head is full first, then the others."""

    def __init__(self, case: Case, windows: Tensor, k: Tensor, v: Tensor) -> None:
        size = (1, case.batch, case.kv_len, case.kv_heads, case.head_dim)
        cache = DuoKVCache(
            *size, full_heads=(windows == 0)[None], window=case.recent, num_sinks=case.sinks, dtype=k.dtype
        )
        step = cache.plan(case.kv_len)
        cache.layers[0].append(k, v, step)
        self.layer, self.nbytes = cache.layers[0], cache.nbytes
        self.options: dict[str, Any] = {
            "head_windows": windows, "num_sinks": case.sinks, "causal": True, "max_kv_len": case.kv_len,
        }  # fmt: skip
        self.lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32)

    def attend(self, q: Tensor) -> Callable[[], Any]:
        x = self.layer
        return partial(ops.paged_attention, q, x.k, x.v, x.page_table, self.lens, **self.options)


class _Sdpa:
    """scaled_dot_product_attention twice: full heads over all tokens, the others over what they see side by side."""

    def __init__(self, case: Case, windows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        rows = q.view(case.batch, case.kv_heads, -1, case.head_dim)
        seen = torch.arange(case.kv_len)
        seen = seen[(seen < case.sinks) | (seen >= case.kv_len - case.recent)]
        self.out, self.calls = torch.empty_like(rows), []
        for heads, tokens in ((windows == 0, slice(None)), (windows != 0, seen)):
            if heads.any():
                keys, values = (x[:, tokens][:, :, heads].transpose(1, 2).contiguous() for x in (k, v))
                self.calls.append((heads.nonzero()[:, 0], rows[:, heads].contiguous(), keys, values))

    def __call__(self) -> Tensor:
        for heads, rows, k, v in self.calls:
            self.out[:, heads] = F.scaled_dot_product_attention(rows, k, v)
        return self.out.flatten(1, 2)[:, None]


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """The inputs of a case, copied until what they read outgrows the caches, and everyone who computes it or its
    like."""
    dtype, generator = getattr(torch, case.dtype), torch.Generator().manual_seed(0)
    size = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
    k, v = (in_cache(torch.randn(size, generator=generator).to(dtype).transpose(1, 2)) for _ in range(2))
    heads = torch.arange(case.kv_heads)
    order = torch.cat([heads[::2], heads[1::2]])  # full heads lie among the others
    windows = torch.full((case.kv_heads,), case.recent, dtype=torch.int32)
    windows[order[: case.full]] = 0
    seen = min(case.kv_len, case.sinks + case.recent)
    pairs = case.batch * (case.full * case.kv_len + (case.kv_heads - case.full) * seen)  # (KV head, token)
    read = 2 * pairs * case.head_dim * k.element_size()
    copies = max(1, -(-4 * last_level_cache_bytes() // read))
    q = torch.randn(case.batch, 1, case.heads, case.head_dim, generator=generator).to(dtype)

    masked = {"head_windows": windows, "num_sinks": case.sinks, "causal": True}
    forms: dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]] = {
        "effops": lambda k, v: _Rings(case, windows, k, v).attend(q),
        "masked": lambda k, v: partial(ops.attention, q, k, v, **masked),
        "dense": lambda k, v: partial(ops.attention, q, k, v, causal=True),
        "sdpa": lambda k, v: _Sdpa(case, windows, q, k, v),
    }
    caches = [(k, v), *((in_cache(k), in_cache(v)) for _ in range(copies - 1))]
    group, ends = case.heads // case.kv_heads, 2 * q.nbytes
    pair = 4 * group * case.head_dim
    every = case.batch * case.kv_heads * case.kv_len
    return Work(
        name=case.name,
        fields=asdict(case),
        dtype=dtype,
        bytes=read + ends,
        flops=pair * pairs,
        copies=copies,
        candidates={name: candidate(forms[name], caches) for name in (*OWN, *peers)},
        check=_checker(case, windows, q, k, v),
        others={"dense": Other("all heads over all tokens", k.nbytes + v.nbytes + ends, pair * every)},
    )


def _checker(case: Case, windows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[str, Tensor], float]:
    """Every KV head of the first and the last sequence, in float64."""
    group = case.heads // case.kv_heads

    @cache
    def exact(whole: bool, b: int, g: int, rounded_scores: bool) -> Any:
        own = q[b : b + 1, :, g * group : (g + 1) * group], *(x[b : b + 1, :, g : g + 1] for x in (k, v))
        window = 0 if whole else int(windows[g])
        options: dict[str, Any] = {"window": window, "num_sinks": case.sinks, "rounded_scores": rounded_scores}
        return attention_bound(*own, causal=True, **options)[0]

    def check(name: str, out: Tensor) -> float:
        if out.shape != q.shape or out.dtype != q.dtype:
            return torch.inf
        parts = {(b, g): out[b : b + 1, :, g * group : (g + 1) * group]
                 for b in {0, case.batch - 1} for g in range(case.kv_heads)}  # fmt: skip
        return max(exact(name == "dense", b, g, name not in OWN).worst(x) for (b, g), x in parts.items())

    return check
