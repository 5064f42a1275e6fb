"""A decode step of sparse attention, selection included, against the floor, dense attention and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ops, reference
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Other, Work, candidate, in_cache
from effops.cache.memory import cache_memory
from effops.reference.bounds import Interval, attention_bound, sparse_attention_bound

OWN = ("effops", "attend", "select", "quest", "quest select", "dense")
PEERS = ("torch", "rows")
GPU_PEERS = ("torch",)
NUM_SINKS, WINDOW = 4, 16
PAGE = 16  # tokens that Quest chooses together
RANGE = 3.0  # deviations of a key's channel that labels tell apart


@dataclass(frozen=True)
class Case:
    """One query token a sequence over 1/fraction of kv_len tokens, found by labels of so many channels and bits."""

    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kv_len: int = 32768
    fraction: int = 16
    channels: int = 8
    bits: int = 4

    @property
    def name(self) -> str:
        sizes = f"B={self.batch} H={self.heads} G={self.kv_heads} D={self.head_dim} L={self.kv_len}"
        return f"1/{self.fraction} by {self.channels} channels of {self.bits} bits {sizes} {self.dtype}"

    @property
    def selected(self) -> int:
        return max(NUM_SINKS + WINDOW, self.kv_len // self.fraction)

    @property
    def pages(self) -> int:
        """As many tokens in whole pages; at least those that the first and the last tokens touch."""
        return max(-(-NUM_SINKS // PAGE) - (-(WINDOW - 1) // PAGE) + 1, self.selected // PAGE)


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """GQA 4, 1 and 8; a batch; wider labels; the longest context."""
    for dtype in dtypes:
        yield Case(dtype)
        yield Case(dtype, heads=8)
        yield Case(dtype, heads=64)
        yield Case(dtype, batch=4, kv_len=8192)
        yield Case(dtype, channels=16, bits=8)
        yield Case(dtype, kv_heads=4, kv_len=131072)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(dtype, heads=8, kv_heads=2, head_dim=32, kv_len=1024)
        yield Case(dtype, batch=2, heads=4, kv_heads=2, head_dim=32, kv_len=600, channels=12, bits=8)


@dataclass
class _Inputs:
    """One copy: a query, a cache, its labels, the lists that they give, and the bounds of its pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    labels: Tensor
    lists: Tensor
    low: Tensor
    high: Tensor


class _Labels:
    """The first channels of every head; what the case's options are to the ops."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.channels = torch.arange(case.channels, dtype=torch.int32).repeat(case.kv_heads, 1)
        step = 2 * RANGE / (2**case.bits - 1)
        self.options: dict[str, Any] = {
            "bits": case.bits,
            "scales": torch.full((case.kv_heads, case.channels), step),
        }

    def of(self, k: Tensor) -> Tensor:
        """[B,L,G,words], memory [B,G,words,L]."""
        c = self.case
        words = -(-c.channels * c.bits // 32)
        memory = cache_memory(c.batch, c.kv_heads, words, c.kv_len, dtype=torch.int32, device="cpu")
        labels = memory.permute(0, 3, 1, 2)
        slots = torch.arange(c.kv_len, dtype=torch.int32).expand(c.batch, -1)
        ops.append_labels(labels, k, slots, self.channels, **self.options)
        return labels

    def search(self, q: Tensor, labels: Tensor, *, by: Any = ops) -> Tensor:
        options = {"num_sinks": NUM_SINKS, "window": WINDOW, **self.options}
        lists: Tensor = by.label_topk(q, labels, self.channels, self.case.selected, **options)
        return lists


def _bounds(case: Case, k: Tensor) -> list[Tensor]:
    """Low and high [B,P,G,D], memory [B,G,P,D]."""
    size = (case.batch, case.kv_heads, -(-case.kv_len // PAGE), case.head_dim)
    low, high = (cache_memory(*size, dtype=k.dtype, device="cpu").transpose(1, 2) for _ in range(2))
    slots = torch.arange(case.kv_len, dtype=torch.int32).expand(case.batch, -1)
    ops.append_page_bounds(low, high, k, slots, PAGE)
    return [low, high]


def _search_pages(case: Case, x: _Inputs, *, by: Any = ops) -> Tensor:
    lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32)
    options = {"kv_lens": lens, "num_sinks": NUM_SINKS, "window": WINDOW}
    lists: Tensor = by.page_topk(x.q, x.low, x.high, case.pages, PAGE, **options)
    return lists


class _Torch:
    """The same with numbers as labels, the channels of the keys themselves: a product, topk, a gather, attention."""

    def __init__(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)  # [B,G,L,D], contiguous
        self.rows = q.view(case.batch, case.kv_heads, -1, case.head_dim)
        self.labels = self.k[..., : case.channels].transpose(2, 3).contiguous()
        self.case = case

    def __call__(self) -> tuple[Tensor, Tensor]:
        scores = (self.rows[..., : self.case.channels] @ self.labels).amax(2)
        lists = scores.topk(self.case.selected, sorted=False).indices
        rows = lists[..., None].expand(-1, -1, -1, self.case.head_dim)
        out = F.scaled_dot_product_attention(self.rows, self.k.gather(2, rows), self.v.gather(2, rows))
        return out.reshape(self.case.batch, 1, self.case.heads, self.case.head_dim), lists


class _Rows:
    """The listed rows of keys and values, summed up: how fast rows at random can be read, by torch's embedding_bag."""

    def __init__(self, case: Case, one: _Inputs) -> None:
        heads = torch.arange(case.batch * case.kv_heads)[:, None] * case.kv_len
        bags = (one.lists.flatten(0, 1) + heads).view(-1, min(128, case.selected))  # int64, enough of them for threads
        self.bags = bags if case.selected % 128 == 0 else (one.lists.flatten(0, 1) + heads).long()
        self.tables = [x.transpose(1, 2).flatten(0, 2) for x in (one.k, one.v)]

    def __call__(self) -> list[Tensor]:
        return [F.embedding_bag(self.bags, table, mode="sum") for table in self.tables]


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """The inputs of a case, copied until what they select outgrows the caches, and everyone who computes it or its
    like."""
    dtype, generator, labels = getattr(torch, case.dtype), torch.Generator().manual_seed(0), _Labels(case)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    size = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
    k, v = (in_cache(draw(*size).transpose(1, 2)) for _ in range(2))
    kept = labels.of(k)
    rows = 2 * case.batch * case.kv_heads * case.selected * case.head_dim * k.element_size()
    copies = max(1, -(-4 * last_level_cache_bytes() // (rows + kept.nbytes)))
    inputs = []
    for i in range(copies):
        q = draw(case.batch, 1, case.heads, case.head_dim)
        own = [x if i == 0 else in_cache(x) for x in (k, v)]
        mine = kept if i == 0 else labels.of(k)
        inputs.append(_Inputs(q, own[0], own[1], mine, labels.search(q, mine), *_bounds(case, own[0])))

    ours: dict[str, Callable[[_Inputs], Callable[[], Any]]] = {
        "effops": lambda x: lambda: ops.sparse_attention(x.q, x.k, x.v, labels.search(x.q, x.labels)),
        "attend": lambda x: partial(ops.sparse_attention, x.q, x.k, x.v, x.lists),
        "select": lambda x: partial(labels.search, x.q, x.labels),
        "quest": lambda x: lambda: ops.sparse_attention(x.q, x.k, x.v, _search_pages(case, x)),
        "quest select": lambda x: partial(_search_pages, case, x),
        "dense": lambda x: partial(ops.attention, x.q, x.k, x.v),
    }
    theirs: dict[str, Callable[[_Inputs], Callable[[], Any]]] = {
        "torch": lambda x: _Torch(case, x.q, x.k, x.v),
        "rows": lambda x: _Rows(case, x),
    }
    ends, lists = 2 * inputs[0].q.nbytes, inputs[0].lists.nbytes
    pair, scored = 4 * case.batch * case.heads * case.head_dim, 2 * case.batch * case.heads * case.channels
    number = case.batch * case.kv_heads * case.kv_len * case.channels * k.element_size()
    bounds, paged = inputs[0].low.nbytes * 2, case.pages * PAGE
    page_rows, page_lists = rows // case.selected * paged, lists // case.selected * paged
    compared = 2 * case.batch * case.heads * case.head_dim * inputs[0].low.shape[1] * 2
    others = {
        "attend": Other("sparse_attention alone, over lists made before", rows + ends + lists, pair * case.selected),
        "select": Other("label_topk alone", kept.nbytes + lists, scored * case.kv_len),
        "quest": Other(
            f"sparse_attention over {case.pages} pages that bounds find",
            page_rows + bounds + ends + 2 * page_lists,
            pair * paged + compared,
        ),
        "quest select": Other("page_topk alone", bounds + page_lists, compared),
        "dense": Other("attention over all tokens", k.nbytes + v.nbytes + ends, pair * case.kv_len),
        "torch": Other("the same, labels being numbers", rows + number + ends, pair * case.selected),
        "rows": Other("sums of the rows: the rate of reads at random", rows, rows // k.element_size()),
    }
    candidates = {name: candidate(form, [(x,) for x in inputs]) for name, form in ours.items()}
    return Work(
        name=case.name,
        fields={**asdict(case), "selected": case.selected},
        dtype=dtype,
        bytes=kept.nbytes + rows + ends + 2 * lists,
        flops=pair * case.selected + scored * case.kv_len,
        copies=copies,
        candidates=candidates | {name: candidate(theirs[name], [(x,) for x in inputs]) for name in peers},
        check=_checker(case, inputs[0], labels),
        others={name: other for name, other in others.items() if name in (*OWN, *peers)},
    )


def _checker(case: Case, x: _Inputs, labels: _Labels) -> Callable[[str, Any], float]:
    """Lists against the reference's, all of them; outputs of the first and the last (sequence, KV head) in float64."""
    group, corners = case.heads // case.kv_heads, {(0, 0), (case.batch - 1, case.kv_heads - 1)}

    @cache
    def right() -> Tensor:
        return labels.search(x.q, x.labels, by=reference)

    @cache
    def right_pages() -> Tensor:
        return _search_pages(case, x, by=reference)

    def exact(lists: Tensor | None, b: int, g: int) -> Interval:
        own = slice(b, b + 1), slice(None), slice(g, g + 1)
        q, k, v = x.q[b : b + 1, :, g * group : (g + 1) * group], x.k[own], x.v[own]
        if lists is None:
            return attention_bound(q, k, v)[0]
        return sparse_attention_bound(q, k, v, lists[b : b + 1, g : g + 1].int())[0]

    def check(name: str, result: Any) -> float:
        if name in ("select", "quest select"):
            return 0.0 if torch.equal(result, right() if name == "select" else right_pages()) else torch.inf
        if name == "rows":
            total, sums = torch.cat([t.double().sum().view(1) for t in result]), _row_sums(x)
            return float(((total - sums[0]).abs() / sums[1]).max())
        if name == "torch":
            out, lists = result
        else:
            out, lists = result, None if name == "dense" else right_pages() if name == "quest" else right()
        if out.shape != x.q.shape or out.dtype != x.q.dtype:
            return torch.inf
        parts = {(b, g): out[b : b + 1, :, g * group : (g + 1) * group] for b, g in corners}
        return max(exact(lists, b, g).worst(part) for (b, g), part in parts.items())

    return check


def _row_sums(x: _Inputs) -> tuple[Tensor, Tensor]:
    """The sums of all listed keys and of all listed values, and what rounding each addition in bfloat16 may leave."""
    sums, sizes = [], []
    for t in (x.k, x.v):
        rows = t.transpose(1, 2).double().gather(2, x.lists.long()[..., None].expand(-1, -1, -1, t.shape[-1]))
        sums.append(rows.sum())
        sizes.append(rows.abs().sum() * 2.0**-7)
    return torch.stack(sums), torch.stack(sizes)
