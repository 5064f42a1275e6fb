"""Which ops have device kernels: those run on CUDA tensors, and on CPU tensors under ``EFFOPS_BACKEND=simt``."""

from __future__ import annotations

import os

WITHOUT_DEVICE_KERNEL = ("decoder", "decoder_layer", "medusa_draft")
WITH_DEVICE_KERNEL = (
    "accumulate_mass", "append_evicting", "append_kv", "append_labels", "append_page_bounds", "attention",
    "cascade_attention", "commit_kv", "fused_experts", "grouped_mm", "grouped_mm_weight_gradient", "label_topk",
    "merge_kv", "merge_states", "moe_permute", "moe_sort", "moe_unpermute", "pack_ancestors", "packed_linear",
    "page_topk", "paged_attention", "pim_gemv", "rms_norm", "rotary", "rotary_append", "sample", "sampling_probs",
    "silu_mul", "sparse_attention", "topk_routing", "tree_attention", "varlen_attention", "verify_greedy",
    "verify_rejection", "verify_typical",
)  # fmt: skip
NO_FLOAT64 = (  # on devices
    "accumulate_mass", "attention", "cascade_attention", "fused_experts", "grouped_mm", "grouped_mm_weight_gradient",
    "paged_attention", "pim_gemv", "sparse_attention", "tree_attention", "varlen_attention",
)  # fmt: skip


def chosen() -> str:
    """The backend of CPU tensors: ``cpu``, or the kernels of CUDA on the host."""
    return os.environ.get("EFFOPS_BACKEND") or "cpu"


def device_kernel(op: str, dtype: str) -> str:
    """What an op has beside the CPU's kernels, in words."""
    if op in WITHOUT_DEVICE_KERNEL:
        return "none: on the CPU alone, also under EFFOPS_BACKEND=simt"
    if op in NO_FLOAT64 and dtype == "float64":
        return "none for float64"
    return "CUDA; the same on the host under EFFOPS_BACKEND=simt"
