"""Attention of trees of draft tokens against the floor, against the same rows without their mask and against peers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from effops import ops
from effops.bench.peers import flashinfer, torch_forms, vllm_cpu
from effops.bench.peers.flex import Flex
from effops.bench.roof import last_level_cache_bytes
from effops.bench.work import Other, Work, candidate
from effops.decoding.tree import TokenTree
from effops.reference.bounds import Interval, attention_bound, tree_attention_bound
from effops.reference.cache import tree_mask

OWN = ("effops", "unmasked", "decode")
PEERS = ("sdpa-mask", "sdpa-rows", "matmul", "flex", "vllm-cpu")
GPU_PEERS = ("sdpa-mask", "sdpa-rows", "matmul", "flex", "flashinfer")
MAX_DEPTH, MAX_NODES = 8, 1024


@dataclass(frozen=True)
class Case:
    """Verification of a tree whose keys are the last of kv_len, the same tree in each sequence."""

    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    nodes: int = 64
    kv_len: int = 4096
    page: int = 0  # tokens a page; 0: no pages

    @property
    def name(self) -> str:
        pages = f" pages of {self.page}" if self.page else ""
        sizes = f"B={self.batch} H={self.heads} G={self.kv_heads} D={self.head_dim} L={self.kv_len}"
        return f"tree of {self.nodes} {sizes}{pages} {self.dtype}"

    @property
    def visible(self) -> int:
        """(node, key) pairs of one head and sequence: every committed key, and ancestors with the node itself."""
        return self.nodes * (self.kv_len - self.nodes) + sum(d + 1 for d in bushy_tree(self.nodes).depths)


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """64 nodes; 4, 8 and 16 with 1, 2 and 4 heads a KV head, over as many keys in all; some of both over pages."""
    for dtype in dtypes:
        yield Case(dtype)
        for kv_heads, batch in ((32, 2), (16, 4), (8, 8)):
            for nodes in (4, 8, 16):
                yield Case(dtype, batch, kv_heads=kv_heads, nodes=nodes)
        for page in (16, 64):
            yield Case(dtype, batch=8, nodes=8, page=page)
            yield Case(dtype, page=page)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(dtype, heads=8, kv_heads=2, nodes=4, kv_len=1024)
        yield Case(dtype, heads=4, kv_heads=2, nodes=32, kv_len=256, page=16)


@cache
def bushy_tree(nodes: int) -> TokenTree:
    """Each node a child of a random earlier one that is less than MAX_DEPTH deep; one tree a size."""
    draw = random.Random(nodes)
    parents, depths = [-1], [0]
    while len(parents) < nodes:
        parents.append(draw.choice([i for i, depth in enumerate(depths) if depth < MAX_DEPTH]))
        depths.append(depths[parents[-1]] + 1)
    return TokenTree(parents)


def work(case: Case, peers: tuple[str, ...], *, device: str = "cpu") -> Work:
    """The inputs of a case, copied often enough to outgrow the caches, and everyone who computes it or its like.

    Values of the tree's own keys are up to kv_len / 4 times as large as the others, so that a key too many or too few
    shows in the result.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int) -> Tensor:  # heads-major memory
        size = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(size, generator=generator).to(device, dtype).transpose(1, 2)

    tree = bushy_tree(case.nodes)
    ancestors, depths = tree.ancestors()[None], torch.tensor([tree.depths], dtype=torch.int32)
    mask = torch.ones(case.nodes, case.kv_len, dtype=torch.bool)
    mask[:, case.kv_len - case.nodes :] = tree_mask(ancestors[0])
    ancestors, depths, mask = (x.to(device) for x in (ancestors, depths, mask))
    q = draw(case.nodes, case.heads).contiguous()
    one = q[:, -1:].contiguous()
    first = draw(case.kv_len, case.kv_heads), draw(case.kv_len, case.kv_heads)
    first[1][:, case.kv_len - case.nodes :] *= min(1024, max(1, case.kv_len // 4))

    kv_bytes = first[0].nbytes + first[1].nbytes
    copies = max(1, -(-4 * last_level_cache_bytes(device) // max(1, kv_bytes)))
    caches = [first, *((_heads_major(first[0]), _heads_major(first[1])) for _ in range(copies - 1))]
    own, plain, paged = caches, cast(Callable[..., Tensor], ops.attention), cast(dict[str, Any], {})
    if case.page:
        table = _page_table(case).to(device)
        own = [(_paged(k, table, case.page), _paged(v, table, case.page)) for k, v in caches]
        paged = {
            "page_table": table,
            "kv_lens": torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device),
        }
        plain = partial(ops.paged_attention, **paged)
    flex = cache(lambda: Flex(q, *first, mask))
    ours: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "effops": lambda k, v: lambda: ops.tree_attention(q, k, v, ancestors, depths=depths, **paged),
        "unmasked": lambda k, v: lambda: plain(q, k, v, causal=False),
        "decode": lambda k, v: lambda: plain(one, k, v, causal=True),
    }
    theirs: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "sdpa-mask": lambda k, v: lambda: torch_forms.sdpa(q, k, v, mask),
        "sdpa-rows": lambda k, v: torch_forms.SdpaMaskRows(q, k, v, mask),
        "matmul": lambda k, v: lambda: torch_forms.matmul(q, k, v, mask),
        "flex": lambda k, v: partial(flex(), k, v),
        "vllm-cpu": lambda k, v: vllm_cpu.Attention(q, k, v),
        "flashinfer": lambda k, v: flashinfer.Attention(q, k, v, mask),
    }
    bytes_, pair = kv_bytes + 2 * q.nbytes, 4 * case.batch * case.heads * case.head_dim
    causal = case.nodes * (case.kv_len - case.nodes) + case.nodes * (case.nodes + 1) // 2
    others = {
        "unmasked": Other("the same rows without the mask", bytes_, pair * case.nodes * case.kv_len),
        "decode": Other("one row", kv_bytes + 2 * one.nbytes, pair * case.kv_len),
        "vllm-cpu": Other("as many plain causal rows", bytes_, pair * causal),
    }
    return Work(
        name=case.name,
        fields={**asdict(case), "tree_depth": tree.max_depth},
        dtype=dtype,
        bytes=bytes_ + ancestors.nbytes,
        flops=pair * case.visible,
        copies=copies,
        candidates={name: candidate(form, own) for name, form in ours.items()}
        | {name: candidate(theirs[name], caches) for name in peers},
        check=_checker(case, q, one, *first, ancestors),
        others={name: other for name, other in others.items() if name in (*OWN, *peers)},
    )


def _heads_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _page_table(case: Case) -> Tensor:
    """int32 [B, entries]: pages in random order, as those of a cache in use."""
    entries = -(-case.kv_len // case.page)
    order = torch.randperm(case.batch * entries, generator=torch.Generator().manual_seed(1))
    return order.to(torch.int32).view(case.batch, entries)


def _paged(x: Tensor, table: Tensor, page: int) -> Tensor:
    """x [B,L,G,D] in pages [P,page,G,D], which are heads-major in memory."""
    batch, length, heads, dim = x.shape
    room = torch.zeros(batch, table.shape[1] * page, heads, dim, dtype=x.dtype, device=x.device)
    room[:, :length] = x
    pages = torch.empty(table.numel(), heads, page, dim, dtype=x.dtype, device=x.device)
    pages[table.flatten().long()] = room.view(-1, page, heads, dim).transpose(1, 2)
    return pages.transpose(1, 2)


def _checker(
    case: Case, q: Tensor, one: Tensor, k: Tensor, v: Tensor, ancestors: Tensor
) -> Callable[[str, Tensor], float]:
    """The first and the last (sequence, KV head) with all their rows, each candidate against what it should compute,
    in float64."""
    group, corners = case.heads // case.kv_heads, {(0, 0), (case.batch - 1, case.kv_heads - 1)}

    @cache
    def exact(what: str, b: int, g: int, rounded_scores: bool) -> Interval:
        rows = (one if what == "decode" else q)[b : b + 1, :, g * group : (g + 1) * group]
        own = rows.cpu(), k[b : b + 1, :, g : g + 1].cpu(), v[b : b + 1, :, g : g + 1].cpu()
        if what == "tree":
            return tree_attention_bound(*own, ancestors.cpu(), rounded_scores=rounded_scores)[0]
        return attention_bound(*own, causal=what != "unmasked", rounded_scores=rounded_scores)[0]

    def check(name: str, out: Tensor) -> float:
        what = {"unmasked": "unmasked", "decode": "decode", "vllm-cpu": "causal"}.get(name, "tree")
        if out.shape != (one if what == "decode" else q).shape or out.dtype != q.dtype:
            return torch.inf
        parts = {(b, g): out[b : b + 1, :, g * group : (g + 1) * group] for b, g in corners}
        return max(exact(what, b, g, name not in OWN).worst(part.cpu()) for (b, g), part in parts.items())

    return check
