"""KV caches: the interface a decoder uses, the dense, the paged and the labelled cache."""

from __future__ import annotations

from effops.cache.base import AcceptedNodes, KVCache, LayerCache, Step, TreeNodes
from effops.cache.dense import DenseKVCache, DenseLayer
from effops.cache.labelled import LabelChannels, LabelledKVCache, LabelledLayer, calibrate_channels
from effops.cache.paged import OutOfPagesError, PageAllocator, PagedKVCache, PagedLayer

__all__ = [
    "AcceptedNodes",
    "DenseKVCache",
    "DenseLayer",
    "KVCache",
    "LabelChannels",
    "LabelledKVCache",
    "LabelledLayer",
    "LayerCache",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "PagedLayer",
    "Step",
    "TreeNodes",
    "calibrate_channels",
]
