"""The ops: thin functions over ``torch.ops.effops``. Their meaning is :mod:`effops.reference`."""

from effops.ops.attention import attention, merge_states, varlen_attention
from effops.ops.cache import append_kv, commit_kv, paged_attention, sparse_attention, tree_attention
from effops.ops.cascade import KVLevel, cascade_attention
from effops.ops.decoder import decoder, decoder_layer
from effops.ops.eviction import accumulate_mass, append_evicting
from effops.ops.experts import expert_capacity, expert_choice_routing, limit_capacity, lora_experts
from effops.ops.gemv import packed_linear
from effops.ops.labels import append_labels, label_topk
from effops.ops.layer import rms_norm, rotary, rotary_append, silu_mul
from effops.ops.merging import MergedEntries, merge_kv
from effops.ops.moe import (
    fused_experts,
    grouped_mm,
    grouped_mm_weight_gradient,
    moe_permute,
    moe_sort,
    moe_unpermute,
    topk_routing,
)
from effops.ops.packed_experts import PackedExperts, pack_expert_layer, pack_experts
from effops.ops.packed_weight import PackedWeight, pack_weight
from effops.ops.page_bounds import append_page_bounds, page_topk
from effops.ops.pim import pim_gemv
from effops.ops.router_losses import GlobalFrequencies, load_balancing_loss, router_z_loss
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
    "GlobalFrequencies",
    "KVLevel",
    "MergedEntries",
    "PackedExperts",
    "PackedWeight",
    "accumulate_mass",
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
    "pack_expert_layer",
    "pack_experts",
    "pack_weight",
    "packed_linear",
    "page_topk",
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
    "varlen_attention",
    "verify_greedy",
    "verify_rejection",
    "verify_typical",
]
