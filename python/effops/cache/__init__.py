"""KV caches: the interface a decoder uses; dense, paged, labelled, Quest's, offloaded, streaming,
prefix-sharing, evicting and merging caches."""

from __future__ import annotations

from effops.cache.base import AcceptedNodes, KVCache, LayerCache, Step, TreeNodes
from effops.cache.dense import DenseKVCache, DenseLayer
from effops.cache.evicting_layer import HeavyHitterLayer
from effops.cache.heavy_hitter import HeavyHitterKVCache
from effops.cache.labelled import LabelChannels, LabelledKVCache, LabelledLayer, calibrate_channels
from effops.cache.merged import MergedKVCache
from effops.cache.merged_layer import MergedLayer
from effops.cache.offloaded import OffloadedKVCache, OffloadedLayer, Traffic
from effops.cache.paged import OutOfPagesError, PageAllocator, PagedKVCache, PagedLayer
from effops.cache.prefix_tree import PrefixStep, PrefixTreeKVCache, PrefixTreeLayer
from effops.cache.quest import QuestKVCache, QuestLayer
from effops.cache.selecting import SelectingLayer
from effops.cache.streaming import DuoKVCache, StreamingKVCache, StreamingLayer, StreamingStep

__all__ = [
    "AcceptedNodes",
    "DenseKVCache",
    "DenseLayer",
    "DuoKVCache",
    "HeavyHitterKVCache",
    "HeavyHitterLayer",
    "KVCache",
    "LabelChannels",
    "LabelledKVCache",
    "LabelledLayer",
    "LayerCache",
    "MergedKVCache",
    "MergedLayer",
    "OffloadedKVCache",
    "OffloadedLayer",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "PagedLayer",
    "PrefixStep",
    "PrefixTreeKVCache",
    "PrefixTreeLayer",
    "QuestKVCache",
    "QuestLayer",
    "SelectingLayer",
    "Step",
    "StreamingKVCache",
    "StreamingLayer",
    "StreamingStep",
    "Traffic",
    "TreeNodes",
    "calibrate_channels",
]
