"""What every op means, in plain PyTorch: the same names and signatures as ``effops.ops``.

Written to be obviously right rather than fast. Any floating dtype up to float64: float64 inputs are computed
in float64, everything else in float32, and results come back in the input's dtype. All of it is
differentiable through autograd. Nothing here imports the rest of effops.
"""

from __future__ import annotations

from effops.reference.attention import allowed_keys, append_kv, attention, merge_states, varlen_attention
from effops.reference.layer import (
    decoder_layer,
    pack_weight,
    packed_linear,
    rms_norm,
    rotary,
    rotary_append,
    silu_mul,
)
from effops.reference.speculative import pack_ancestors, verify_greedy, verify_rejection, verify_typical

__all__ = [
    "allowed_keys",
    "append_kv",
    "attention",
    "decoder_layer",
    "merge_states",
    "pack_ancestors",
    "pack_weight",
    "packed_linear",
    "rms_norm",
    "rotary",
    "rotary_append",
    "silu_mul",
    "varlen_attention",
    "verify_greedy",
    "verify_rejection",
    "verify_typical",
]
