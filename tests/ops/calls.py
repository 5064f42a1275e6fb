"""One ordinary call of each op, by the names of its schema: what the contract and dispatch tests vary."""

from __future__ import annotations

from typing import Any

import torch
from effops import ops
from strategies.values import int32, normal
from torch import Tensor

Arguments = dict[str, Any]
OPS = [op for name in sorted(set(torch._C._dispatch_get_all_op_names())) if name.startswith("effops::")
       for op in [getattr(torch.ops.effops, name.removeprefix("effops::")).default]]  # fmt: skip


def attention() -> Arguments:
    """B 2, T 3, L 9, H 4, G 2, D 8, Dv 6; every option that goes together."""
    return {
        "q": normal(2, 3, 4, 8), "k": normal(2, 9, 2, 8, seed=1), "v": normal(2, 9, 2, 6, seed=2),
        "kv_lens": int32(9, 5), "kv_starts": int32(0, 2), "causal": True, "window": 0, "num_sinks": 1,
        "prefix_lens": int32(3, 0), "head_windows": int32(0, 4), "sink_logits": normal(4, seed=3), "softcap": 5.0,
        "scale": 0.4, "max_kv_len": 9,
    }  # fmt: skip


def varlen_attention() -> Arguments:
    call = attention()
    del call["kv_lens"]
    ragged = {name: call[name].flatten(0, 1) for name in ("q", "k", "v")}
    return call | ragged | {"cu_seqlens_q": int32(0, 4, 6), "cu_seqlens_k": int32(0, 8, 15), "max_q_len": 4}


def backward(name: str, call: Arguments) -> Arguments:
    out, lse = getattr(torch.ops.effops, name)(**call)
    options = {n: x for n, x in call.items() if n not in ("max_q_len", "max_kv_len")}
    gradients = {"d_out": normal(*out.shape, seed=4), "d_lse": normal(*lse.shape, seed=5)}
    return gradients | options | {"out": out, "lse": lse}


def paged_attention() -> Arguments:
    """B 2, N 6, pages of 4 tokens."""
    call = attention()
    for name in ("k", "v"):
        call[f"{name}_pages"] = torch.nn.functional.pad(call.pop(name), (0, 0, 0, 0, 0, 3)).reshape(6, 4, 2, -1)
    table = int32(0, 1, 2, 3, 4, 5).view(2, 3)
    ragged = {"cu_seqlens_q": int32(0, 4, 6), "max_q_len": 4, "q": call["q"].flatten(0, 1)}
    return call | ragged | {"page_table": table, "max_kv_len": 10}


def tree_attention() -> Arguments:
    """The same with trees of 4 and 2 nodes."""
    call = paged_attention()
    for name in ("causal", "prefix_lens"):
        del call[name]
    call["k"], call["v"] = call.pop("k_pages"), call.pop("v_pages")
    bits = torch.tensor([[1, 3, 5, 11], [1, 3, 3, 3]]).view(2, 4, 1)
    return call | {"ancestors": bits, "depths": int32(0, 1, 1, 2, 0, 1, 0, 0).view(2, 4)}


def sparse_attention() -> Arguments:
    """B 2, H 4, G 2, pages of 4 tokens, a list for each KV head."""
    call = paged_attention()
    names = ("page_table", "kv_lens", "kv_starts", "sink_logits", "softcap", "scale")
    indices = int32(0, 8, -1, 3, 3, 1, 4, -1, 2, 4, -1, -1).view(2, 2, 3)
    caches = {"k": call["k_pages"], "v": call["v_pages"], "q": normal(2, 1, 4, 8), "indices": indices}
    return {name: call[name] for name in names} | caches


def cascade_attention() -> Arguments:
    """N 6, H 4, G 2: a level of one group of five rows, and trees of 4 and 2 nodes; pages of 4 tokens."""
    call = tree_attention()
    names = ("q", "ancestors", "depths", "sink_logits", "softcap", "scale")
    shared = {"k": normal(1, 5, 2, 8, seed=6), "v": normal(1, 5, 2, 6, seed=7), "lens": int32(4),
              "group_indptr": int32(0, 5), "page_tables": int32()}  # fmt: skip
    own = {"k": call["k"], "v": call["v"], "lens": call["kv_lens"], "group_indptr": call["cu_seqlens_q"],
           "page_tables": call["page_table"]}  # fmt: skip
    return {name: call[name] for name in names} | {"causal": False} | {n: [shared[n], own[n]] for n in own}


def by_levels(*, k: Any, v: Any, lens: Any, group_indptr: Any, page_tables: Any, **call: Any) -> Arguments:
    """The arguments of the op as those of the public function."""
    tables = [t if t.dim() > 1 else None for t in page_tables]
    return call | {"levels": [ops.KVLevel(*level) for level in zip(k, v, lens, group_indptr, tables, strict=True)]}


def accumulate_mass() -> Arguments:
    """B 2, T 3, H 4, G 2, pages of 4 tokens."""
    call = attention()
    names = ("kv_lens", "kv_starts", "causal", "num_sinks", "softcap", "scale", "q")
    pages = {name: x for name, x in paged_attention().items() if name in ("k_pages", "page_table")}
    named = {name: call[name] for name in names} | {"k": pages["k_pages"], "page_table": pages["page_table"]}
    return named | {"mass": normal(2, 2, 12, seed=6).abs(), "lse": normal(2, 3, 4, seed=7), "window": 4}


def append_evicting() -> Arguments:
    """B 2, T 2, L 5, G 3: the first sequence is full, the other has a free slot in each head."""
    positions = torch.stack([int32(3, 0, 4, 1, 2), int32(3, 0, -1, 1, 2)])[:, None].expand(2, 3, 5).clone()
    return {
        "k_cache": normal(2, 5, 3, 8), "v_cache": normal(2, 5, 3, 6, seed=1), "k": normal(2, 2, 3, 8, seed=2),
        "v": normal(2, 2, 3, 6, seed=3), "mass": normal(2, 3, 5, seed=4).abs(), "positions": positions,
        "new_positions": int32(5, 6, 4, -1).view(2, 2), "recent": 2, "num_sinks": 1,
    }  # fmt: skip


def merge_kv() -> Arguments:
    """B 2, L 7, G 3, up to 3 entries kept."""
    kept = int32(0, 3, 6, -1, 2, 4, -1, -1, 1, 2, 3, -1, 4, -1, -1, -1, 0, 1, 3, -1, *[-1] * 4).view(2, 3, 4)
    return {
        "k": normal(2, 7, 3, 8), "v": normal(2, 7, 3, 6, seed=1), "kept": kept, "kv_lens": int32(7, 5),
        "merging": "weighted", "least_similarity": 0.1,
    }  # fmt: skip


def append_kv() -> Arguments:
    """Pages of 4 tokens, two a sequence."""
    return {
        "k_cache": normal(4, 4, 3, 8), "v_cache": normal(4, 4, 3, 6, seed=1),
        "k": normal(2, 2, 3, 8, seed=2), "v": normal(2, 2, 3, 6, seed=3), "slots": int32(0, 6, 3, -1).view(2, 2),
        "page_table": int32(2, 0, 1, 3).view(2, 2),
    }  # fmt: skip


def commit_kv() -> Arguments:
    call = {name: x for name, x in append_kv().items() if name in ("k_cache", "v_cache", "page_table")}
    return call | {"nodes": int32(0, 2, 3, 1, 3, -1).view(2, 3), "starts": int32(3, 4)}


def append_labels() -> Arguments:
    """B 2, T 2, L 5, G 2, D 8, labels of five channels in four bits."""
    return {
        "labels": torch.zeros(2, 5, 2, 1, dtype=torch.int32), "k": normal(2, 2, 2, 8), "bits": 4,
        "slots": int32(0, 4, 3, -1).view(2, 2), "channels": int32(0, 3, 1, 7, 2, 5, 5, 4, 0, 6).view(2, 5),
        "scales": normal(2, 5, seed=1).abs(), "offsets": normal(2, 5, seed=2),
    }  # fmt: skip


def label_topk() -> Arguments:
    """B 2, H 4, G 2, L 9, D 8, labels of nine channels in four bits, a list for each KV head."""
    words = torch.randint(-(2**31), 2**31, (2, 9, 2, 2), generator=torch.Generator().manual_seed(0)).int()
    channels = int32(0, 3, 1, 7, 2, 5, 6, 4, 0, 5, 4, 0, 6, 1, 1, 2, 3, 7).view(2, 9)
    cache = {"labels": words, "channels": channels, "scales": normal(2, 9, seed=1).abs(), "bits": 4}
    lengths = {"kv_lens": int32(9, 6), "kv_starts": int32(0, 2)}
    return {"q": normal(2, 1, 4, 8), "k": 5, "num_sinks": 1, "window": 2, **cache, **lengths}


def append_page_bounds() -> Arguments:
    """B 2, T 3, P 2 of three tokens, G 2, D 8."""
    return {
        "low": normal(2, 2, 2, 8, seed=1), "high": normal(2, 2, 2, 8, seed=2), "k": normal(2, 3, 2, 8),
        "slots": int32(0, 1, 5, 3, -1, 2).view(2, 3), "page": 3,
    }  # fmt: skip


def page_topk() -> Arguments:
    """B 2, H 4, G 2, P 5 of three tokens, D 8, a list of three pages for each KV head."""
    bounds = {"low": normal(2, 5, 2, 8, seed=1), "high": normal(2, 5, 2, 8, seed=2), "page": 3}
    return {"q": normal(2, 1, 4, 8), "pages": 3, "num_sinks": 1, "window": 2, "kv_lens": int32(14, 8), **bounds}


def pim_gemv() -> Arguments:
    """B 2, M 2, K 11, N 5 in two tiles of three banks, two chunks of eight values, results of four."""
    call = {"x": normal(2, 2, 11), "banks": normal(2, 2, 2, 3, 8, seed=1), "out_features": 5, "sum_values": 4}
    return call | {"lanes": 2, "rows": int32(5, 3), "columns": int32(11, 6), "channels": 2}


def packed_linear(rows: int = 3) -> Arguments:
    weight, bias, residual = normal(5, 8, seed=1), normal(5, seed=2), normal(rows, 5, seed=3)
    call = {"x": normal(rows, 8), "weight": weight, "bias": bias, "residual": residual}
    return call | {"norm": normal(8, seed=4), "norm_eps": 1e-5}


def rotary() -> Arguments:
    angles = normal(9, 3)
    positions = int32(0, 3, 8, 1, 1, 2).view(2, 3)
    return {"x": normal(2, 3, 4, 8), "cos": angles.cos(), "sin": angles.sin(), "positions": positions}


def rotary_append() -> Arguments:
    """H 2, G 1."""
    call = rotary()
    caches = {"k_cache": normal(4, 4, 1, 8, seed=1), "v_cache": normal(4, 4, 1, 8, seed=2)}
    paged = {"slots": int32(0, 6, 3, -1, 2, 1).view(2, 3), "page_table": int32(2, 0, 1, 3).view(2, 2)}
    return {"qkv": call.pop("x")} | call | caches | paged


def decoder_layer() -> Arguments:
    """B 2, T 3, d 6, H 4, G 2, D 8, f 5, pages of 4 tokens, trees of three nodes."""
    norms, biases = [normal(6, seed=s) for s in (1, 2)], [normal(n, seed=n) for n in (64, 6, 10, 6)]
    weights = [normal(*shape, seed=sum(shape)) for shape in ((64, 6), (6, 32), (10, 6), (6, 5))]
    call = rotary()
    caches = {"k_cache": normal(4, 4, 2, 8, seed=3), "v_cache": normal(4, 4, 2, 8, seed=4)}
    bits = torch.tensor([[1, 3, 5], [1, 3, 7]]).view(2, 3, 1)
    return {
        "x": normal(2, 3, 6), "attention_norm": norms[0], "qkv": weights[0], "qkv_bias": biases[0], "o": weights[1],
        "o_bias": biases[1], "mlp_norm": norms[1], "gate_up": weights[2], "gate_up_bias": biases[2],
        "down": weights[3], "down_bias": biases[3], "cos": call["cos"], "sin": call["sin"],
        "positions": call["positions"], **caches, "slots": int32(0, 1, 2, 4, 5, -1).view(2, 3),
        "kv_lens": int32(3, 6), "norm_eps": 1e-5, "window": 4, "max_kv_len": 6,
        "page_table": int32(2, 0, 1, 3).view(2, 2), "ancestors": bits, "depths": int32(0, 1, 1, 0, 1, 2).view(2, 3),
    }  # fmt: skip


def decoder() -> Arguments:
    """Two layers like decoder_layer's between an embedding of 5 and an LM head of 7 tokens."""
    call = decoder_layer()
    names = [f"{n}{b}" for n in ("qkv", "o", "gate_up", "down") for b in ("", "_bias")]
    lists = {n: [call.pop(n)] * 2 for n in ("attention_norm", *names, "mlp_norm")}
    caches = {n: call.pop(n).expand(2, -1, -1, -1, -1).clone() for n in ("k_cache", "v_cache")}
    ends = {"tokens": torch.tensor([[0, 4, 2], [3, 1, 1]]), "embedding": normal(5, 6), "norm": normal(6, seed=5),
            "lm_head": normal(7, 6, seed=6), "windows": [call.pop("window"), 0]}  # fmt: skip
    del call["x"]
    return ends | call | lists | caches


def medusa_draft() -> Arguments:
    """B 2, d 6, two layers, K 2, V 5, T 4, nine tokens."""
    return {
        "hidden": normal(2, 6), "root": torch.tensor([8, 0]), "depths": int32(0, 1, 1, 2), "ranks": int32(0, 0, 4, 1),
        "weight": normal(2, 2, 6, 6, seed=1), "bias": normal(2, 2, 6, seed=2), "projections": normal(2, 6, 6, seed=3),
        "roots": normal(2, 6, 6, seed=4), "embedding": normal(9, 6, seed=5), "lm_head": normal(5, 6, seed=6),
        "vocabulary": torch.tensor([7, 1, 8, 2, 0]),
    }  # fmt: skip


def sampling() -> Arguments:
    return {"logits": normal(2, 3, 9), "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}


def moe_ids() -> Tensor:
    """N 3, K 2, of four experts."""
    return int32(2, 0, 3, -1, 0, 2).view(3, 2)


def grouped_mm() -> Arguments:
    """R 6, d 5, f 7, three groups, one row left over."""
    sizes = {"in_sizes": int32(5, 2, 4), "out_sizes": int32(7, 6, 3)}
    call = {"x": normal(6, 5), "w": normal(3, 5, 7, seed=1), "offsets": int32(2, 4, 5), "bias": normal(3, 7, seed=2)}
    return call | sizes | {"batch_invariant": True}


def grouped_mm_weight_gradient() -> Arguments:
    call = {name: x for name, x in grouped_mm().items() if name not in ("w", "bias", "batch_invariant")}
    return call | {"dy": normal(6, 7, seed=3)}


def fused_experts() -> Arguments:
    """N 3, K 2, d 8, f 5, four experts, biases, int8: floating weights have calls of their own."""
    up, down = ops.pack_experts(normal(4, 10, 8, seed=1)), ops.pack_experts(normal(4, 8, 5, seed=2))
    layer = {"w_gate_up": up.data, "w_down": down.data, "scale_gate_up": up.scale, "scale_down": down.scale,
             "bias_gate_up": normal(4, 10, seed=3), "bias_down": normal(4, 8, seed=4)}  # fmt: skip
    choices = {"weights": normal(3, 2, seed=5).abs(), "ids": moe_ids()}
    return {"x": normal(3, 8), **layer, **choices, "activation": "gelu", "interleaved": True}


PARENTS = (-1, 0, 0, 1, 1, 2, -2)  # a tree of six nodes, and padding


def verification(**more: Any) -> Arguments:
    """B 2, T 7, V 5."""
    drafts = torch.tensor([[9, 1, 0, 3, 3, 4, 9], [0, 2, 2, 1, 0, 3, 0]])
    return {"parents": int32(*PARENTS).repeat(2, 1), "draft_tokens": drafts} | more


def law(seed: int) -> Tensor:
    return (2 * normal(2, 7, 5, seed=seed)).softmax(-1)


def uniforms(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CALLS = {
    "accumulate_mass": accumulate_mass,
    "append_evicting": append_evicting,
    "append_kv": append_kv,
    "append_labels": append_labels,
    "append_page_bounds": append_page_bounds,
    "attention": attention,
    "attention_backward": lambda: backward("attention", attention()),
    "cascade_attention": cascade_attention,
    "commit_kv": commit_kv,
    "decoder": decoder,
    "decoder_layer": decoder_layer,
    "fused_experts": fused_experts,
    "grouped_mm": grouped_mm,
    "grouped_mm_weight_gradient": grouped_mm_weight_gradient,
    "label_topk": label_topk,
    "medusa_draft": medusa_draft,
    "merge_kv": merge_kv,
    "merge_states": lambda: {"outs": normal(3, 2, 4, 8), "lses": normal(3, 2, 4, seed=1)},
    "moe_permute": lambda: {"x": normal(3, 8), "ids": moe_ids(), "num_experts": 4},
    "moe_sort": lambda: {"ids": moe_ids(), "num_experts": 4},
    "moe_unpermute": lambda: {"y": normal(5, 8), "weights": normal(3, 2, seed=1), "inverse": moe_ids()},
    "pack_ancestors": lambda: {"parents": int32(*PARENTS).repeat(2, 1)},
    "packed_linear": packed_linear,
    "page_topk": page_topk,
    "paged_attention": paged_attention,
    "pim_gemv": pim_gemv,
    "rms_norm": lambda: {"x": normal(2, 3, 8), "weight": normal(8, seed=1), "eps": 1e-5, "weight_offset": 1.0},
    "rotary": rotary,
    "rotary_append": rotary_append,
    "tree_attention": tree_attention,
    "sample": lambda: sampling() | {"uniforms": torch.linspace(0, 0.99, 6, dtype=torch.float64).view(2, 3)},
    "sampling_probs": sampling,
    "silu_mul": lambda: {"x": normal(2, 3, 8)},
    "sparse_attention": sparse_attention,
    "topk_routing": lambda: {
        "logits": normal(3, 8),
        "k": 3,
        "scoring": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "bias": normal(8, seed=1),
        "groups": 4,
        "topk_group": 2,
        "group_score": "top2",
    },
    "varlen_attention": varlen_attention,
    "varlen_attention_backward": lambda: backward("varlen_attention", varlen_attention()),
    "verify_greedy": lambda: verification(target_tokens=torch.tensor([[1, 3, 0, 2, 2, 2, 2], [2, 0, 0, 2, 4, 2, 2]])),
    "verify_rejection": lambda: verification(
        draft_probs=law(1), target_probs=law(2), uniforms=uniforms(2, 8), siblings="iid"
    ),
    "verify_typical": lambda: verification(target_probs=law(3), epsilon=0.2, delta=0.5, uniforms=uniforms(2)),
}


def name_of(op: torch._ops.OpOverload) -> str:
    return op._schema.name.removeprefix("effops::")


def tensor_arguments(op: torch._ops.OpOverload) -> list[str]:
    return [a.name for a in op._schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]


def results(got: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """What a call returned, as a tuple."""
    return () if got is None else got if isinstance(got, tuple) else (got,)


def run(op: torch._ops.OpOverload, call: Arguments) -> tuple[Tensor, ...]:
    """All results of a call, the caches it writes included."""
    written = tuple(call[a.name] for a in op._schema.arguments if a.alias_info is not None)
    return results(op(**call)) + written
