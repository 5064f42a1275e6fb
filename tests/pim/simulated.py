"""Small models, and a system of every kind with every scheduler that it can follow."""

from __future__ import annotations

from effops.pim import ModelShape

SMALL = ModelShape(layers=4, hidden=1024, heads=8, kv_heads=8, head_dim=128, intermediate=4096, vocab=0, ffn_matrices=2)
MIXTURE = ModelShape(
    layers=2, hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=2048, vocab=1000, experts=8, top_k=2
)
UNITS = ("blocked", "serial", "interleaved", "neupims")
EVERY = [
    *[("neupims", s, SMALL) for s in UNITS],
    ("newton", "blocked", SMALL),
    ("npu", "processor", SMALL),
    ("a100", "processor", SMALL),
    ("h100", "processor", MIXTURE),
    ("duplex", "duplex", MIXTURE),
    ("duplex", "co_processing", MIXTURE),
    ("bank_pim", "duplex", MIXTURE),
]
