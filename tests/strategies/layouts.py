"""The same values in other memory: every layout an op has to accept, with poison wherever no element lies."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from strategies.values import bits

Layout = Callable[[Tensor], Tensor]


def poison(dtype: torch.dtype) -> float:
    """NaN, or an index far out of any range."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def embed(x: Tensor, order: Sequence[int] | None = None, before: int = 0, behind: int = 0, step: int = 1) -> Tensor:
    """x as a view of larger, poisoned memory: its dimensions in the given order there, ``before`` and ``behind``
    elements around it in each, the last one in steps."""
    order = range(x.dim()) if order is None else order
    steps = [step if d == x.dim() - 1 else 1 for d in order]
    sizes = [before + x.shape[d] * s + behind for d, s in zip(order, steps, strict=True)]
    memory = torch.full(sizes, poison(x.dtype), dtype=x.dtype)
    cut = tuple(slice(before, before + x.shape[d] * s, s) for d, s in zip(order, steps, strict=True))
    view = memory[cut].permute([list(order).index(d) for d in range(x.dim())])
    view.copy_(x)
    return view


def heads_major(x: Tensor) -> Tensor:
    """[.., tokens, heads, dim] with the memory of [.., heads, tokens, dim], as caches lie."""
    order = list(range(x.dim()))
    if x.dim() >= 3:
        order[-3], order[-2] = order[-2], order[-3]
    return embed(x, order)


def gapped(x: Tensor) -> Tensor:
    """A slice of something larger in every dimension; odd offsets, nothing aligned."""
    return embed(x, before=1, behind=2)


def gapped_heads_major(x: Tensor) -> Tensor:
    order = list(range(x.dim()))
    if x.dim() >= 3:
        order[-3], order[-2] = order[-2], order[-3]
    return embed(x, order, before=3, behind=1)


def strided(x: Tensor) -> Tensor:
    """The last dimension in steps of 3 elements."""
    return embed(x, behind=1, step=3)


def reversed_dims(x: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return embed(x, list(range(x.dim()))[::-1], behind=1)


def guarded(x: Tensor) -> Tensor:
    """Contiguous, up to the last byte of a page after which nothing may be read: a read past the end is SIGSEGV."""
    if x.numel() == 0:
        return x.clone()
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    if libc.mprotect(ctypes.c_void_p(address + (pages - 1) * page), ctypes.c_size_t(page), no_access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=(pages - 1) * page - size)
    return flat.view(x.shape).copy_(x)


def memory(x: Tensor) -> Tensor:
    """The bits of every element of x's memory, those between and around its own included."""
    return bits(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()))


LAYOUTS: dict[str, Layout] = {
    "contiguous": torch.clone,
    "heads-major": heads_major,
    "gapped": gapped,
    "gapped heads-major": gapped_heads_major,
    "strided": strided,
    "reversed dims": reversed_dims,
    "guarded": guarded,
}
