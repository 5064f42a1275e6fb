"""Calls of ``attention`` and ``varlen_attention``: shapes, values, memory layouts, options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from strategies.layouts import LAYOUTS
from strategies.values import KINDS, int32, values

LENGTHS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 150, 300)
TOKENS = (1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 0)
DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 100, 128, 129, 192, 255, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8)


@dataclass(frozen=True)
class Case:
    """Arguments of one call. Keys that do not exist hold NaN."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def __repr__(self) -> str:
        tensors = ", ".join(f"{list(x.shape)} by {list(x.stride())}" for x in self.tensors)
        options = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return f"Case({tensors}, {options})"


def lengths(batch: int, most: int) -> st.SearchStrategy[Tensor | None]:
    """None or int32 [batch] up to ``most``, with its ends likely."""
    one = st.sampled_from((0, 1, most // 2, max(most - 1, 0), most)).map(lambda n: min(n, most))
    return st.none() | st.lists(st.integers(0, most) | one, min_size=batch, max_size=batch).map(lambda n: int32(*n))


@st.composite
def mask_options(draw: st.DrawFn, batch: int, kv_heads: int, most: int) -> dict[str, Any]:
    """Everything that hides keys, lengths aside."""
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    window = st.integers(0, most + 2) | st.sampled_from((1, 2))
    kind = draw(st.sampled_from(("none", "window", "head_windows")))
    if kind == "window":
        options["window"] = draw(window)
    if kind == "head_windows":
        options["head_windows"] = int32(*draw(st.lists(window, min_size=kv_heads, max_size=kv_heads)))
    if kind != "none":
        options["num_sinks"] = draw(st.sampled_from((0, 0, 1, 3, 70)))
    options["prefix_lens"] = draw(lengths(batch, most + 1))
    return options


@st.composite
def score_options(draw: st.DrawFn, heads: int) -> dict[str, Any]:
    """What changes scores or their sum."""
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((0.5, 3.0, 50.0)))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((0.0, 1.0, -0.3, 0.05)))
    if draw(st.booleans()):
        sinks = st.sampled_from((0.0, -3.0, 2.5, 40.0, -60.0))
        options["sink_logits"] = torch.tensor(draw(st.lists(sinks, min_size=heads, max_size=heads)))
    return options


def hide_poison(k: Tensor, v: Tensor, kv_lens: Tensor | None, kv_starts: Tensor | None) -> None:
    """NaN into the keys and values that do not exist."""
    for b in range(k.shape[0]):
        end = k.shape[1] if kv_lens is None else int(kv_lens[b])
        start = 0 if kv_starts is None else int(kv_starts[b])
        for x in (k, v):
            x[b, end:] = torch.nan
            x[b, :start] = torch.nan


@st.composite
def dense(
    draw: st.DrawFn, dtype: torch.dtype, *, tokens: tuple[int, ...] = TOKENS, kinds: tuple[str, ...] = KINDS
) -> Case:
    """A call of ``attention``, in any layouts, with any options."""
    batch, q_len, capacity = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3, 0), tokens, LENGTHS))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    dim, v_dim = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DIMS))
    seed, kind = draw(st.integers(0, 1000)), draw(st.sampled_from(kinds))
    q = values(batch, q_len, kv_heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    k = values(batch, capacity, kv_heads, dim, dtype=dtype, seed=seed + 2, kind=kind)
    v = values(batch, capacity, kv_heads, v_dim, dtype=dtype, seed=seed + 4, kind=kind)
    options = draw(mask_options(batch, kv_heads, capacity)) | draw(score_options(kv_heads * group))
    options["kv_lens"], options["kv_starts"] = draw(lengths(batch, capacity)), draw(lengths(batch, capacity))
    hide_poison(k, v, options["kv_lens"], options["kv_starts"])
    layout = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    return Case((draw(layout)(q), draw(layout)(k), draw(layout)(v)), options)


def offsets(parts: list[int]) -> Tensor:
    """int32 [B + 1], the running sum."""
    return int32(0, *torch.tensor(parts, dtype=torch.int64).cumsum(0).tolist())


@st.composite
def ragged(draw: st.DrawFn, dtype: torch.dtype, *, kinds: tuple[str, ...] = KINDS) -> Case:
    """A call of ``varlen_attention``; some rows belong to no sequence, keys past the last offset hold NaN."""
    batch = draw(st.integers(0, 4))
    q_lens = draw(st.lists(st.sampled_from(TOKENS), min_size=batch, max_size=batch))
    k_lens = draw(st.lists(st.sampled_from(LENGTHS), min_size=batch, max_size=batch))
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(GROUPS))
    dim, v_dim = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DIMS))
    seed, kind, spare = draw(st.integers(0, 1000)), draw(st.sampled_from(kinds)), draw(st.sampled_from((0, 3)))
    q = values(sum(q_lens) + spare, kv_heads * group, dim, dtype=dtype, seed=seed, kind=kind)
    k = values(sum(k_lens) + spare, kv_heads, dim, dtype=dtype, seed=seed + 2, kind=kind)
    v = values(sum(k_lens) + spare, kv_heads, v_dim, dtype=dtype, seed=seed + 4, kind=kind)
    most = max(k_lens, default=0)
    options = draw(mask_options(batch, kv_heads, most)) | draw(score_options(kv_heads * group))
    options["kv_starts"] = draw(lengths(batch, most))
    for x in (k, v):
        x[sum(k_lens) :] = torch.nan
        for b, start in enumerate([] if options["kv_starts"] is None else options["kv_starts"].tolist()):
            at = sum(k_lens[:b])
            x[at : at + min(start, k_lens[b])] = torch.nan
    layout = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.__getitem__)
    placed = (draw(layout)(q), draw(layout)(k), draw(layout)(v))
    return Case((*placed, offsets(q_lens), offsets(k_lens)), options)
