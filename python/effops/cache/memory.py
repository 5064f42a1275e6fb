"""The memory of caches."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h


def cache_memory(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised contiguous tensor; on Linux in pages of 2 MB, where the kernel grants them.

    Reads of single rows all over a cache mostly wait for the translation of their addresses, of which a processor
    remembers a few thousand: listed rows are read 1.5 times as fast from large pages, whole caches 1.1 times
    (docs/performance/sparse.md).
    """
    count = torch.Size(shape).numel()
    nbytes = count * dtype.itemsize
    if torch.device(device).type != "cpu" or sys.platform != "linux" or nbytes < _HUGE_PAGE:
        return torch.empty(*shape, dtype=dtype, device=device)
    room = torch.empty(count + _HUGE_PAGE // dtype.itemsize, dtype=dtype)
    begin = -room.data_ptr() % _HUGE_PAGE
    # Advice alone: where it is refused the memory is as it was.
    pages = ctypes.c_void_p(room.data_ptr() + begin), ctypes.c_size_t(nbytes // _HUGE_PAGE * _HUGE_PAGE)
    ctypes.CDLL(None).madvise(*pages, _MADV_HUGEPAGE)
    first = begin // dtype.itemsize
    return room[first : first + count].view(shape)
