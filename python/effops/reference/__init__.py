"""What every op means, in plain PyTorch: the same names and signatures as ``effops.ops``.

Written to be obviously right rather than fast. Any floating dtype up to float64: float64 inputs are computed
in float64, everything else in float32, and results come back in the input's dtype; only the laws of next tokens
are float64 inside and float32 outside. All of it but draws is differentiable through autograd. Nothing here
imports the rest of effops.
"""

from __future__ import annotations

from effops.reference.attention import allowed_keys, attention, merge_states, varlen_attention
from effops.reference.cache import (
    append_kv,
    commit_kv,
    pack_mask,
    paged_attention,
    sparse_attention,
    tree_attention,
    tree_mask,
)
from effops.reference.cascade import cascade_attention
from effops.reference.eviction import accumulate_mass, append_evicting
from effops.reference.labels import append_labels, label_scores, label_topk
from effops.reference.layer import (
    decoder,
    decoder_layer,
    pack_weight,
    packed_linear,
    rms_norm,
    rotary,
    rotary_append,
    silu_mul,
)
from effops.reference.medusa import medusa_draft
from effops.reference.merging import merge_kv
from effops.reference.moe import (
    expert_capacity,
    expert_choice_routing,
    fused_experts,
    grouped_mm,
    grouped_mm_weight_gradient,
    limit_capacity,
    lora_experts,
    moe_permute,
    moe_sort,
    moe_unpermute,
    topk_routing,
)
from effops.reference.page_bounds import append_page_bounds, page_topk, page_upper_bounds
from effops.reference.pim import pim_gemv
from effops.reference.router_losses import load_balancing_loss, router_z_loss
from effops.reference.sampling import sample, sampling_probs
from effops.reference.speculative import pack_ancestors, verify_greedy, verify_rejection, verify_typical

__all__ = [
    "accumulate_mass",
    "allowed_keys",
    "append_evicting",
    "append_kv",
    "append_labels",
    "append_page_bounds",
    "attention",
    "cascade_attention",
    "commit_kv",
    "decoder",
    "decoder_layer",
    "expert_capacity",
    "expert_choice_routing",
    "fused_experts",
    "grouped_mm",
    "grouped_mm_weight_gradient",
    "label_scores",
    "label_topk",
    "limit_capacity",
    "load_balancing_loss",
    "lora_experts",
    "medusa_draft",
    "merge_kv",
    "merge_states",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
    "pack_ancestors",
    "pack_mask",
    "pack_weight",
    "packed_linear",
    "page_topk",
    "page_upper_bounds",
    "paged_attention",
    "pim_gemv",
    "rms_norm",
    "rotary",
    "rotary_append",
    "router_z_loss",
    "sample",
    "sampling_probs",
    "silu_mul",
    "sparse_attention",
    "topk_routing",
    "tree_attention",
    "tree_mask",
    "varlen_attention",
    "verify_greedy",
    "verify_rejection",
    "verify_typical",
]
