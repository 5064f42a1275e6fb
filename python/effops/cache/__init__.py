"""KV caches: the interface a decoder uses and the dense cache."""

from __future__ import annotations

from effops.cache.base import KVCache, LayerCache, Step
from effops.cache.dense import DenseKVCache, DenseLayer

__all__ = ["DenseKVCache", "DenseLayer", "KVCache", "LayerCache", "Step"]
