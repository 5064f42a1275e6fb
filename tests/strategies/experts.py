"""Inputs of mixtures of experts: loads, choices, weights in every layout."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies.layouts import LAYOUTS
from strategies.values import int32, values

LOADS = ("any", "empty first", "empty middle", "empty last", "one has all", "none", "rows left over")
PLACES = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)


def load_of(kind: str, experts: int, rows: int, numbers: list[int]) -> list[int]:
    """How many of the rows each expert gets; ``numbers`` are as many shares."""
    if kind == "none" or rows == 0:
        return [0] * experts
    if kind == "one has all":
        return [rows if e == numbers[0] % experts else 0 for e in range(experts)]
    absent = {"empty first": 0, "empty middle": experts // 2, "empty last": experts - 1}.get(kind, -1)
    shares = [0 if e == absent and experts > 1 else 1 + n for e, n in enumerate(numbers)]
    total = sum(shares) + (1 + sum(shares) // 4 if kind == "rows left over" else 0)
    ends = [rows * sum(shares[: e + 1]) // total for e in range(experts)]
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]


def offsets_of(load: list[int]) -> Tensor:
    return torch.tensor(load).cumsum(0).int()


@st.composite
def offsets(draw: st.DrawFn, experts: int, rows: int) -> Tensor:
    """int32 [E]: the ends of the experts' rows."""
    numbers = draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts))
    return offsets_of(load_of(draw(st.sampled_from(LOADS)), experts, rows, numbers))


@st.composite
def choices(draw: st.DrawFn, tokens: int, k: int, experts: int) -> Tensor:
    """int32 [N,K]: any experts, most of them distinct, often dropped ones, sometimes nothing else."""
    kind = draw(st.sampled_from(("distinct", "any", "dropped", "one expert", "all dropped")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if kind == "distinct" and k <= experts:
        ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :k]
    elif kind == "one expert":
        ids = torch.full((tokens, k), draw(st.integers(0, experts - 1)))
    else:
        ids = torch.randint(experts, (tokens, k), generator=generator)
    if kind in ("dropped", "all dropped"):
        ids[torch.rand(tokens, k, generator=generator) < (0.4 if kind == "dropped" else 2.0)] = -1
    return ids.int()


@st.composite
def sizes(draw: st.DrawFn, experts: int, features: int) -> Tensor | None:
    """int32 [E], how many of the features each expert has; None: all."""
    if draw(st.booleans()):
        return None
    return int32(*draw(st.lists(st.integers(0, features), min_size=experts, max_size=experts)))


def poisoned(x: Tensor, sizes: Tensor | None, dim: int) -> Tensor:
    """x [E,d,f] with NaN in all that the experts do not have of the dimension."""
    if sizes is None:
        return x
    index = torch.arange(x.shape[dim]).view([-1 if d == dim else 1 for d in range(x.dim())])
    return torch.where(index < sizes.view(-1, *[1] * (x.dim() - 1)), x, torch.nan)


def weights_of(tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[N,K] of 0 and more, in the type that ops take beside values of the dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return values(tokens, k, dtype=wide, seed=seed).abs()


def layer_of(
    experts: int, dim: int, inner: int, dtype: torch.dtype, gated: bool = True, biased: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The weights of ``fused_experts``, of a size that keeps float16 far from its largest number."""
    rows = 2 * inner if gated else inner
    wide: dict[str, Any] = {
        "w_gate_up": values(experts, rows, dim, dtype=torch.float64, seed=seed) / max(1, dim) ** 0.5,
        "w_down": values(experts, dim, inner, dtype=torch.float64, seed=seed + 1) / max(1, inner) ** 0.5,
    }
    if biased:
        wide |= {"bias_gate_up": values(experts, rows, dtype=torch.float64, seed=seed + 2),
                 "bias_down": values(experts, dim, dtype=torch.float64, seed=seed + 3)}  # fmt: skip
    return {name: x.to(dtype) for name, x in wide.items()}
