"""Drop-in modules over ``effops.ops``: a decoder layer's parts, with torch's own path for gradients."""

from __future__ import annotations

from effops.nn.attention import Attention, Rope
from effops.nn.balance import BiasBalancer
from effops.nn.basic import MLP, Linear, RMSNorm
from effops.nn.decoder import DecoderLayer
from effops.nn.latent import LatentAttention
from effops.nn.moe import MoE, Router, Routing
from effops.nn.packed import PackedLinear, Quantized, quantize_
from effops.nn.rotary import RotaryEmbedding, inverse_frequencies

__all__ = [
    "MLP",
    "Attention",
    "BiasBalancer",
    "DecoderLayer",
    "LatentAttention",
    "Linear",
    "MoE",
    "PackedLinear",
    "Quantized",
    "RMSNorm",
    "Rope",
    "RotaryEmbedding",
    "Router",
    "Routing",
    "inverse_frequencies",
    "quantize_",
]
