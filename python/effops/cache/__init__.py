"""KV caches: the interface a decoder uses, the dense and the paged cache."""

from __future__ import annotations

from effops.cache.base import AcceptedNodes, KVCache, LayerCache, Step, TreeNodes
from effops.cache.dense import DenseKVCache, DenseLayer
from effops.cache.paged import OutOfPagesError, PageAllocator, PagedKVCache, PagedLayer

__all__ = [
    "AcceptedNodes",
    "DenseKVCache",
    "DenseLayer",
    "KVCache",
    "LayerCache",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "PagedLayer",
    "Step",
    "TreeNodes",
]
