"""The ops: thin functions over ``torch.ops.effops``. Their meaning is :mod:`effops.reference`."""

from effops.ops.attention import attention, merge_states, varlen_attention
from effops.ops.cache import append_kv, commit_kv, paged_attention, tree_attention
from effops.ops.decoder import decoder, decoder_layer
from effops.ops.gemv import PackedWeight, pack_weight, packed_linear
from effops.ops.layer import rms_norm, rotary, rotary_append, silu_mul
from effops.ops.sampling import sample, sampling_probs
from effops.ops.speculative import (
    Accepted,
    medusa_draft,
    pack_ancestors,
    verify_greedy,
    verify_rejection,
    verify_typical,
)

__all__ = [
    "Accepted",
    "PackedWeight",
    "append_kv",
    "attention",
    "commit_kv",
    "decoder",
    "decoder_layer",
    "medusa_draft",
    "merge_states",
    "pack_ancestors",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_append",
    "sample",
    "sampling_probs",
    "silu_mul",
    "tree_attention",
    "varlen_attention",
    "verify_greedy",
    "verify_rejection",
    "verify_typical",
]
