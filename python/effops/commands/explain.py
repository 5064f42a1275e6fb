"""``effops explain OP``: the path and the schedule that would run."""

from __future__ import annotations

import argparse

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
SIZES: dict[str, dict[str, int | None]] = {  # op: its sizes, with defaults; None is required
    "attention": {
        "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": 0,
        "window": 0, "num_sinks": 0,
    },
    "varlen_attention": {
        "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": 0,
        "window": 0, "num_sinks": 0,
    },
    "paged_attention": {
        "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": 0,
        "window": 0, "num_sinks": 0, "page": 16,
    },
    "tree_attention": {
        "batch": 1, "q_len": None, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": 0,
        "window": 0, "num_sinks": 0,
    },
    "sparse_attention": {
        "batch": 1, "selected": None, "heads": None, "kv_heads": None, "head_dim": None, "v_dim": 0, "lists": 0,
    },
    "cascade_attention": {
        "batch": 1, "q_len": 1, "shared_len": None, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None,
        "v_dim": 0,
    },
    "decoder_layer": {
        "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "width": None,
        "inner": None, "window": 0,
    },
    "decoder": {
        "layers": None, "vocab": None, "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None,
        "head_dim": None, "width": None, "inner": None, "window": 0,
    },
    "medusa_draft": {"batch": 1, "heads": None, "layers": 1, "width": None, "vocab": None},
    "merge_states": {"parts": None, "rows": None, "head_dim": None},
    "append_labels": {"batch": 1, "q_len": 1, "kv_heads": None, "channels": None, "bits": 0},
    "label_topk": {
        "batch": 1, "kv_len": None, "heads": None, "kv_heads": None, "channels": None, "bits": 0, "selected": None,
        "lists": 0,
    },
    "append_page_bounds": {"batch": 1, "q_len": 1, "kv_heads": None, "head_dim": None},
    "page_topk": {
        "batch": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None, "pages": None, "page": 16,
        "lists": 0,
    },
    "accumulate_mass": {
        "batch": 1, "q_len": 1, "kv_len": None, "heads": None, "kv_heads": None, "head_dim": None,
    },
    "append_evicting": {"batch": 1, "q_len": 1, "slots": None, "kv_heads": None, "head_dim": None, "v_dim": 0},
    "merge_kv": {"batch": 1, "slots": None, "kept": None, "kv_heads": None, "head_dim": None, "v_dim": 0},
    "append_kv": {"batch": 1, "q_len": 1, "kv_heads": None, "head_dim": None, "v_dim": 0},
    "commit_kv": {"batch": 1, "q_len": 1, "kv_heads": None, "head_dim": None, "v_dim": 0},
    "pim_gemv": {
        "batch": 1, "rows": 1, "n": None, "k": None, "units": 32, "values": 512, "lanes": 16, "channels": 32,
    },
    "packed_linear": {"rows": 1, "n": None, "k": None, "bits": 0, "group": 0},
    "rms_norm": {"rows": 1, "dim": None},
    "rotary": {"rows": 1, "heads": None, "head_dim": None},
    "rotary_append": {"rows": 1, "heads": None, "kv_heads": None, "head_dim": None},
    "sample": {"rows": 1, "vocab": None},
    "sampling_probs": {"rows": 1, "vocab": None},
    "silu_mul": {"rows": 1, "dim": None},
    "topk_routing": {"rows": 1, "experts": None, "k": None},
    "moe_sort": {"rows": 1, "experts": None, "k": None},
    "moe_permute": {"rows": 1, "experts": None, "k": None, "dim": None},
    "moe_unpermute": {"rows": 1, "k": None, "dim": None},
    "grouped_mm": {"rows": 1, "groups": None, "n": None, "k": None},
    "grouped_mm_weight_gradient": {"rows": 1, "groups": None, "n": None, "k": None},
    "fused_experts": {"rows": 1, "experts": None, "k": None, "width": None, "inner": None},
    "pack_ancestors": {"batch": 1, "nodes": None},
    "verify_greedy": {"batch": 1, "nodes": None},
    "verify_rejection": {"batch": 1, "nodes": None, "vocab": None},
    "verify_typical": {"batch": 1, "nodes": None, "vocab": None},
}  # fmt: skip
MASKED = ("attention", "varlen_attention", "paged_attention")  # these take causal


def dtype_name(text: str) -> str:
    """A dtype's name in full, from either spelling."""
    if text not in DTYPES and text not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES.get(text, text)


def size(text: str) -> int:
    """An integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = parser.add_subparsers(dest="op", metavar="OP", required=True)
    for op, sizes in SIZES.items():
        one = ops.add_parser(op, help=f"the schedule of {op}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--dtype", type=dtype_name, default="float32", metavar="|".join(DTYPES), help="element type")
        for name, default in sizes.items():
            flag = f"--{name.replace('_', '-')}"
            if default is None:
                one.add_argument(flag, type=size, required=True, help="required")
            else:
                one.add_argument(flag, type=size, default=default, help="0: none" if default == 0 else "size")
        if op in MASKED:
            one.add_argument("--causal", action="store_true", help="bottom-right causal mask")


def run(arguments: argparse.Namespace) -> int:
    from effops._explain import explain

    names = ["dtype", *SIZES[arguments.op], *(["causal"] if arguments.op in MASKED else [])]
    print(explain(arguments.op, **{name: getattr(arguments, name) for name in names}))
    return 0
