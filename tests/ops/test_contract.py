"""What every op refuses, generated from the schemas: each tensor argument with a wrong dtype, rank, shape or device,
or requiring grad where there is none. The error names op, argument, expected and got; nothing is written, and the op
works on. What an op may not refuse, other strides, is generated too."""

from __future__ import annotations

import re
from typing import Any

import effops.ops
import pytest
import torch
from calls import CALLS, OPS, by_levels, name_of, run, tensor_arguments
from strategies.layouts import LAYOUTS
from strategies.values import int32, normal, same_bits
from torch import Tensor

pytestmark = pytest.mark.core

ARGUMENTS = [pytest.param(op, name, id=f"{name_of(op)}-{name}") for op in OPS for name in tensor_arguments(op)]
each_argument = pytest.mark.parametrize("op, name", ARGUMENTS)

# (op, argument, dimension) that may grow by one: nothing else has its extent.
FREE = {
    ("attention", "q", 1), ("attention", "v", 3), ("varlen_attention", "q", 0), ("varlen_attention", "v", 2),
    ("merge_states", "outs", 3), ("rms_norm", "x", 0), ("rms_norm", "x", 1), ("rotary", "x", 2), ("rotary", "x", 3),
    ("rotary_append", "qkv", 2), ("paged_attention", "q", 0), ("paged_attention", "v_pages", 3),
    ("tree_attention", "q", 0), ("tree_attention", "v", 3), ("paged_attention", "page_table", 1),
    ("append_kv", "page_table", 1), ("commit_kv", "page_table", 1), ("rotary_append", "page_table", 1),
    ("decoder_layer", "page_table", 1), ("decoder", "page_table", 1), ("decoder", "embedding", 0),
    ("decoder", "lm_head", 0), ("medusa_draft", "embedding", 0), ("commit_kv", "k_cache", 3),
    ("commit_kv", "v_cache", 3),
    ("sample", "logits", 2),
    ("sampling_probs", "logits", 0), ("sampling_probs", "logits", 1), ("sampling_probs", "logits", 2),
    ("silu_mul", "x", 0), ("silu_mul", "x", 1), ("pack_ancestors", "parents", 0), ("pack_ancestors", "parents", 1),
    ("verify_typical", "target_probs", 2), ("tree_attention", "page_table", 1), ("topk_routing", "logits", 0),
    ("pim_gemv", "x", 1), ("pim_gemv", "x", 2), ("pim_gemv", "banks", 1), ("pim_gemv", "banks", 2),
    ("pim_gemv", "banks", 3),
    ("sparse_attention", "v", 3), ("sparse_attention", "indices", 2), ("sparse_attention", "page_table", 1),
    ("cascade_attention", "q", 0),
    ("accumulate_mass", "k", 0), ("append_labels", "labels", 1), ("append_labels", "k", 3), ("label_topk", "q", 3),
    ("label_topk", "labels", 1), ("merge_kv", "v", 3), ("merge_kv", "k", 3), ("merge_kv", "kept", 2),
    ("moe_sort", "ids", 0), ("moe_sort", "ids", 1), ("moe_permute", "x", 1), ("moe_permute", "ids", 1),
    ("moe_unpermute", "y", 0), ("moe_unpermute", "y", 1), ("grouped_mm", "x", 0),
    ("grouped_mm_weight_gradient", "x", 1), ("grouped_mm_weight_gradient", "dy", 1),
}  # fmt: skip
ANY_DTYPE = {("append_labels", "k"), ("decoder", "embedding")}  # of floating ones
ANY_RANK = {("rms_norm", "x"), ("sampling_probs", "logits"), ("silu_mul", "x")}
WITH_GRADIENT = {
    "attention", "grouped_mm", "merge_states", "moe_permute", "moe_unpermute", "topk_routing",
    "varlen_attention",
}  # fmt: skip
WITHOUT_OWN_GRADIENT = {("topk_routing", "bias")}  # of ops that have one in other inputs


def refused(op: Any, call: dict[str, Any], argument: str | None = None, says: str = "expected .+, got .+") -> None:
    """The call fails in the project's format, changes none of its arguments, and an ordinary call still works."""
    before = {n: x.detach().clone() for n, x in call.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    with pytest.raises(RuntimeError) as error:
        op(**call)
    names = argument or "|".join(a.name for a in op._schema.arguments)
    assert re.match(rf"{name_of(op)}: ({names})(\[\d+\])?: {says}", str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    assert all(same_bits(call[n].detach(), x) for n, x in before.items())
    run(op, CALLS[name_of(op)]())


def test_every_op_and_argument_has_its_call():
    assert {name_of(op) for op in OPS} == set(CALLS)
    for op in OPS:
        call = CALLS[name_of(op)]()
        assert set(tensor_arguments(op)) <= set(call) <= {a.name for a in op._schema.arguments}, name_of(op)
        assert all(torch.isfinite(x).all() for x in run(op, call))


@each_argument
def test_wrong_dtype(op, name):
    call = CALLS[name_of(op)]()
    if not call[name].is_floating_point():
        wrong = [torch.int64, torch.int32, torch.int16, torch.float32]
    elif name in (tensor_arguments(op)[0], "q") or (name_of(op), name) in ANY_DTYPE:
        wrong = [torch.int64, torch.complex64, torch.bool]  # it sets the dtype of others
    else:
        wrong = [torch.int64, torch.complex64, torch.bool, torch.float64, torch.bfloat16, torch.float32]
    for dtype in set(wrong) - {call[name].dtype}:
        blamed = None if name == "q" else name  # d_out is compared with q
        refused(op, call | {name: call[name].to(dtype)}, blamed, "expected dtype .+, got .+")


@each_argument
def test_wrong_rank(op, name):
    call = CALLS[name_of(op)]()
    for x in (call[name][None], call[name][..., None], call[name].select(0, 0), call[name].sum().to(call[name].dtype)):
        last = call[name].dim() - 1
        extends = x.dim() > 0 and (x.shape[-1] == call[name].shape[-1] or (name_of(op), name, last) in FREE)
        if (name_of(op), name) in ANY_RANK and extends:
            continue
        refused(op, call | {name: x})


def to_meta(x: Any) -> Any:
    if isinstance(x, list):
        return [to_meta(item) for item in x]
    return x.to("meta") if isinstance(x, Tensor) else x


@each_argument
def test_wrong_shape(op, name):
    call = CALLS[name_of(op)]()
    for d in range(call[name].dim()):
        changed = call | {name: torch.cat([call[name], call[name].narrow(d, -1, 1)], d)}
        if (name_of(op), name, d) not in FREE:
            refused(op, changed)
            continue
        on_meta = {n: to_meta(x) for n, x in changed.items()}
        assert [x.shape for x in run(op, changed)] == [x.shape for x in run(op, on_meta)]


@each_argument
def test_wrong_device(op, name):
    call = CALLS[name_of(op)]()
    if len(tensor_arguments(op)) == 1:
        return  # alone it decides the device
    first = name == tensor_arguments(op)[0]
    refused(op, call | {name: call[name].to("meta")}, None if first else name, "expected the device of .+, got .+")


@each_argument
def test_any_strides(op, name):
    plain = run(op, CALLS[name_of(op)]())
    for layout, place in LAYOUTS.items():
        call = CALLS[name_of(op)]()
        got = run(op, call | {name: place(call[name])})
        if next(a for a in op._schema.arguments if a.name == name).alias_info is not None:
            continue  # the result is in the placed cache, not in the call's: test_append.py looks at it
        assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True)), layout


@each_argument
def test_requires_grad(op, name):
    call = CALLS[name_of(op)]()
    if not call[name].is_floating_point():
        return  # an integer tensor cannot require grad
    tracked = call | {name: call[name].requires_grad_()}
    if name_of(op) not in WITH_GRADIENT or (name_of(op), name) in WITHOUT_OWN_GRADIENT:
        refused(op, tracked, name, "expected a tensor that does not require grad, got one that does")
        public = getattr(effops.ops, name_of(op), None)
        if public is not None:
            with pytest.raises(RuntimeError, match=f"{name_of(op)}: {name}: expected a tensor that does not require"):
                public(**(by_levels(**tracked) if "group_indptr" in tracked else tracked))
        with torch.no_grad():
            run(op, tracked)
        return
    results = run(op, tracked)
    loss = sum(x.square().sum() for x in results if x.is_floating_point())
    loss.backward()
    assert call[name].grad.shape == call[name].shape and call[name].grad.ne(0).any()


def flawed(row: int, value: float) -> Tensor:
    """Logits of six rows, one of which has this value; the row after it has none but -inf."""
    logits = normal(6, 9)
    logits[row, 7], logits[row + 1] = value, -torch.inf
    return logits.view(2, 3, 9)


def uniforms(third: float) -> Tensor:
    return torch.tensor([0.0, 0.5, third, 0.1, 2.0, 0.3], dtype=torch.float64).view(2, 3)


VALUES = [  # op, argument, value, what the error says after "op: argument: "
    ("attention", "kv_lens", int32(9, -1), r"expected values in \[0, 9\] .+, got -1 at index 1"),
    ("attention", "kv_lens", int32(10, 9), r"expected values in \[0, 9\] .+, got 10 at index 0"),
    ("attention", "kv_lens", int32(-(2**31), 0), "expected values in .+, got -2147483648 at index 0"),
    ("attention", "kv_starts", int32(0, 10), "expected values in .+, got 10 at index 1"),
    ("attention", "kv_starts", int32(-1, 0), "expected values in .+, got -1 at index 0"),
    ("attention", "prefix_lens", int32(0, -3), "expected values in .+, got -3 at index 1"),
    ("attention", "head_windows", int32(-1, 0), "expected values in .+, got -1 at index 0"),
    ("attention", "num_sinks", -1, "expected 0 or more, got -1"),
    ("attention", "softcap", -1.0, "expected 0 .+, got -1"),
    ("attention", "softcap", torch.nan, "expected 0 .+, got nan"),
    ("attention", "scale", torch.inf, "expected a finite number, got inf"),
    ("attention", "max_kv_len", 8, r"expected values in \[0, 8\] .+, got 9 at index 0"),
    ("varlen_attention", "cu_seqlens_q", int32(1, 4, 6), "expected offsets that begin with 0, got 1"),
    ("varlen_attention", "cu_seqlens_q", int32(0, 3, 7), "expected offsets up to 6, got 7"),
    ("varlen_attention", "cu_seqlens_k", int32(0, 8, 7), "expected ascending offsets, got 7 after 8 at index 2"),
    ("varlen_attention", "cu_seqlens_k", int32(0, -5, 7), "expected ascending offsets, got -5 after 0 at index 1"),
    ("varlen_attention", "cu_seqlens_k", int32(0, 8, 19), "expected .+, got 1[19]"),
    ("varlen_attention", "max_q_len", 3, "expected lengths up to max_q_len = 3, got 4 at index 0"),
    ("varlen_attention", "kv_starts", int32(-1, 0), "expected values in .+, got -1 at index 0"),
    ("append_kv", "slots", int32(0, 1, 2, 8).view(2, 2), r"expected values in \[-1, 8\), got 8 at index \[1, 1\]"),
    ("append_kv", "slots", int32(-2, 1, 2, 3).view(2, 2), r"expected values in \[-1, 8\), got -2 at index \[0, 0\]"),
    ("append_kv", "page_table", int32(2, 4, 1, 3).view(2, 2), r"expected pages in \[0, 4\), got 4 at entry 1 of seq"),
    ("commit_kv", "page_table", int32(2, -1, 1, 3).view(2, 2), r"expected pages in \[0, 4\), got -1 at entry 1 of seq"),
    ("commit_kv", "starts", int32(3, 9), r"expected values in \[0, 8\] .+, got 9 at index 1"),
    ("commit_kv", "starts", int32(-1, 4), r"expected values in \[0, 8\] .+, got -1 at index 0"),
    ("commit_kv", "nodes", int32(0, 2, 5, 1, 3, -1).view(2, 3), "expected places below 8, got 8 at index"),
    ("rotary_append", "page_table", int32(2, 0, 9, 3).view(2, 2), r"expected pages in \[0, 4\), got 9 at entry 0 of"),
    ("decoder_layer", "page_table", int32(2, 0, 1, -7).view(2, 2), r"expected pages in \[0, 4\), got -7 at entry 1"),
    ("decoder_layer", "kv_lens", int32(3, 2), "expected 0 or at least the tree's T = 3, got 2 for sequence 1"),
    ("paged_attention", "page_table", int32(0, 1, 6, 3, 4, 5).view(2, 3), r"expected pages in \[0, 6\), got 6 at .+ 2"),
    ("paged_attention", "kv_lens", int32(9, 11), r"expected values in \[0, 10\] \(max_kv_len\), got 11 at .+ 1"),
    ("paged_attention", "kv_lens", int32(-1, 5), r"expected values in \[0, 10\] .+, got -1 at index 0"),
    ("paged_attention", "cu_seqlens_q", int32(0, 4, 7), "expected offsets up to 6, got 7"),
    ("paged_attention", "max_q_len", 3, "expected lengths up to max_q_len = 3, got 4 at index 0"),
    ("paged_attention", "kv_starts", int32(0, 13), r"expected values in \[0, 12\] .+, got 13 at index 1"),
    ("paged_attention", "window", -1, "expected 0 .+, got -1"),
    ("tree_attention", "page_table", int32(0, 1, -1, 3, 4, 5).view(2, 3), "expected pages in .+, got -1 at .+ 2"),
    ("tree_attention", "kv_lens", int32(9, 1), "expected 0 or at least the tree's T = 2, got 1 for sequence 1"),
    ("tree_attention", "kv_lens", int32(9, 13), "expected values in .+, got 13 at index 1"),
    ("tree_attention", "max_q_len", 3, "expected lengths up to max_q_len = 3, got 4 at index 0"),
    ("sparse_attention", "indices", int32(0, 9, *[-1] * 10).view(2, 2, 3), r"expected .+ \[0, 9\), got 9 at .+ 1\]"),
    ("sparse_attention", "indices", int32(*[-1] * 6, 1, *[-1] * 5).view(2, 2, 3), r"expected .+ \[2, 5\), got 1 at .+"),
    ("sparse_attention", "page_table", int32(6, 1, 2, 3, 4, 5).view(2, 3), r"expected .+ \[0, 6\), got 6 at .+ 0"),
    ("sparse_attention", "kv_lens", int32(9, 13), r"expected values in \[0, 12\] .+, got 13 at index 1"),
    ("accumulate_mass", "kv_lens", int32(9, 13), r"expected values in \[0, 12\] \(entries . page\), got 13 at index 1"),
    ("accumulate_mass", "kv_lens", None, "expected a tensor beside page_table, got None"),
    ("accumulate_mass", "kv_starts", int32(-1, 0), r"expected values in \[0, 12\] .+, got -1 at index 0"),
    ("accumulate_mass", "page_table", int32(0, 1, 6, 3, 4, 5).view(2, 3), r"expected .+ \[0, 6\), got 6 at entry 2"),
    ("accumulate_mass", "window", -1, r"expected 0 \(off\) or more, got -1"),
    ("accumulate_mass", "num_sinks", -1, "expected 0 or more, got -1"),
    ("accumulate_mass", "softcap", -1.0, r"expected 0 \(off\) or more, got -1"),
    ("accumulate_mass", "scale", torch.inf, "expected a finite number, got inf"),
    ("append_evicting", "recent", 0, "expected 1 or more, got 0"),
    ("append_evicting", "num_sinks", -1, "expected 0 or more, got -1"),
    ("append_evicting", "new_positions", int32(5, 6, 4, -2).view(2, 2), r"expected .+ \[-1, 2147483647\), got -2 at"),
    ("append_evicting", "recent", 5, "expected a free .+, got none for token 0 in KV head 0 of sequence 0"),
    ("merge_kv", "kv_lens", int32(7, 8), r"expected values in \[0, 7\] \(L\), got 8 at index 1"),
    ("merge_kv", "kv_lens", int32(6, 5), r"expected ascending values in \[0, 6\), then -1 .+, got 6 at .+0, 2"),
    ("merge_kv", "kept", int32(*[0] * 24).view(2, 3, 4), r"expected ascending .+, got 0 at index \[0, 0, 1\]"),
    ("merge_kv", "kept", int32(*[-1] * 21, 0, -1, -1).view(2, 3, 4), r"expected .+ to the end, got 0 at .+2, 1\]"),
    ("merge_kv", "kept", int32(*[-1] * 20, 0, 1, -2, -1).view(2, 3, 4), r"expected .+, got -2 at .+2, 2\]"),
    ("merge_kv", "merging", "mean", "expected none, averaged, pivotal or weighted, got mean"),
    ("merge_kv", "least_similarity", torch.nan, "expected a number or None, got nan"),
    ("append_labels", "slots", int32(0, 4, 5, -1).view(2, 2), r"expected values in \[-1, 5\), got 5 at index \[1, 0\]"),
    ("append_labels", "channels", int32(0, 3, 1, 8, 2, 5, 5, 4, 0, 6).view(2, 5), r"expected .+ \[0, 8\) .+, got 8 at"),
    ("append_labels", "bits", 5, r"expected 0 \(numbers\), 4 or 8, got 5"),
    ("append_labels", "bits", 0, "expected dtype float32, bfloat16, .+, got int32"),
    ("append_labels", "bits", 8, r"expected 2 words a token \(r = 5\), got shape \[2, 5, 2, 1\]"),
    ("label_topk", "channels", int32(*[-1] * 18).view(2, 9), r"expected .+ \[0, 8\) .+, got -1 at index \[0, 0\]"),
    ("label_topk", "kv_lens", int32(9, 10), r"expected values in \[0, 9\] \(L\), got 10 at index 1"),
    ("label_topk", "kv_starts", int32(-1, 0), r"expected values in \[0, 9\] \(L\), got -1 at index 0"),
    ("label_topk", "k", 2, "expected num_sinks .+ window or more, .+, got 2 beside 1 and 2"),
    ("label_topk", "k", 2**31, "expected .+ less than 2.31, got 2147483648 beside 1 and 2"),
    ("label_topk", "num_sinks", -1, "expected 0 or more, got -1"),
    ("label_topk", "window", -1, "expected 0 or more, got -1"),
    ("label_topk", "q", normal(2, 2, 4, 8), r"expected shape \[B, T = 1, H, D\], got \[2, 2, 4, 8\]"),
    ("append_page_bounds", "slots", int32(0, 1, 6, 3, -1, 2).view(2, 3), r"expected .+ \[-1, 6\), got 6 at .+ 2\]"),
    ("append_page_bounds", "page", 0, "expected 1 or more, and P . page less than 2.31, got 0 beside P = 2"),
    ("append_page_bounds", "page", 2**30, "expected 1 .+, and P . page less than 2.31, got 1073741824 beside P = 2"),
    ("page_topk", "page", 0, "expected 1 or more, and P . page less than 2.31, got 0 beside P = 5"),
    ("page_topk", "pages", 2, "expected as many as .+ touch or more, .+, got 2 pages of 3 tokens beside 1 and 2"),
    ("page_topk", "pages", 2**31 // 3 + 1, "expected .+ less than 2.31, got 715827883 pages of 3 tokens beside 1 .+"),
    ("page_topk", "window", 2**63 - 1, "expected .+, got 3 pages of 3 tokens beside 1 and 9223372036854775807"),
    ("page_topk", "kv_lens", int32(14, 16), r"expected values in \[0, 15\] \(P . page\), got 16 at index 1"),
    ("page_topk", "num_sinks", -1, "expected 0 or more, got -1"),
    ("page_topk", "window", -1, "expected 0 or more, got -1"),
    ("page_topk", "q", normal(2, 2, 4, 8), r"expected shape \[B, T = 1, H, D\], got \[2, 2, 4, 8\]"),
    ("pim_gemv", "out_features", 7, r"expected 0 to tiles \* units = 6, got 7"),
    ("pim_gemv", "out_features", -1, r"expected 0 to tiles \* units = 6, got -1"),
    ("pim_gemv", "sum_values", 3, "expected a divisor of values = 8, got 3"),
    ("pim_gemv", "sum_values", 0, "expected a divisor of values = 8, got 0"),
    ("pim_gemv", "lanes", 3, "expected a power of two up to 64, got 3"),
    ("pim_gemv", "lanes", 128, "expected a power of two up to 64, got 128"),
    ("pim_gemv", "channels", 0, "expected 1 or more, got 0"),
    ("pim_gemv", "x", normal(2, 2, 17), r"expected K of at most chunks \* values = 16, got 17"),
    ("pim_gemv", "rows", int32(5, 6), r"expected values in \[0, 5\] \(out_features\), got 6 at index 1"),
    ("pim_gemv", "columns", int32(-1, 6), r"expected values in \[0, 11\] \(K\), got -1 at index 0"),
    ("rotary", "positions", int32(0, 1, 2, 3, 4, 9).view(2, 3), r"expected .+ \[0, 9\), got 9 at index \[1, 2\]"),
    ("decoder_layer", "kv_lens", int32(3, 7), r"expected values in \[0, 6\] \(max_kv_len\), got 7 at index 1"),
    ("decoder_layer", "kv_lens", int32(-1, 3), "expected values in .+, got -1 at index 0"),
    ("decoder_layer", "positions", int32(0, 1, 2, 3, 4, 9).view(2, 3), "expected values in .+, got 9 at index"),
    ("decoder_layer", "slots", int32(0, 1, 2, 3, 4, 8).view(2, 3), r"expected .+ \[-1, 8\), got 8 at index \[1, 2\]"),
    ("decoder_layer", "window", -1, "expected 0 .+, got -1"),
    ("decoder_layer", "gate_up", normal(9, 6), "expected an even number of rows, got shape"),
    ("decoder_layer", "qkv", normal(56, 6), r"expected \(H \+ 2G\) \* D rows .+, got shape \[56, 6\]"),
    ("decoder", "kv_lens", int32(3, 7), r"expected values in \[0, 6\] \(max_kv_len\), got 7 at index 1"),
    ("decoder", "tokens", torch.tensor([[0, 4, 5], [3, 1, 1]]), r"expected .+ \[0, 5\) .+, got 5 at index \[0, 2\]"),
    ("decoder", "tokens", torch.tensor([[0, 4, 2], [-1, 1, 1]]), r"expected values in .+, got -1 at index \[1, 0\]"),
    ("decoder", "windows", [4, -1], "expected 0 .+, got -1"),
    ("decoder", "windows", [], "expected a layer or more, got none"),
    ("decoder", "attention_norm", [normal(6)], "expected a tensor a layer, 2, got 1"),
    ("decoder", "o_bias", [normal(6)], "expected a tensor a layer, 2, or none, got 1"),
    ("decoder", "o", [], "expected a tensor a layer, 2, got 0"),
    ("decoder", "down", [normal(6, 5), normal(6, 4)], r"expected shape .+, got \[6, 4\]"),
    ("decoder", "down", [normal(6, 5), normal(6, 5).double()], "expected dtype .+, got float64"),
    ("medusa_draft", "root", torch.tensor([8, 9]), r"expected values below 9 \(rows of embedding\), got 9 at .+ 1"),
    ("medusa_draft", "depths", int32(1, 1, 1, 2), "expected 0 for the root, got 1 at index 0"),
    ("medusa_draft", "depths", int32(0, 1, 0, 2), r"expected values in \[1, 2\] \(K\), got 0 at index 2"),
    ("medusa_draft", "depths", int32(0, 1, 3, 2), r"expected values in \[1, 2\] \(K\), got 3 at index 2"),
    ("medusa_draft", "ranks", int32(0, 0, 5, 1), r"expected values in \[0, 5\) \(V\), got 5 at index 2"),
    ("medusa_draft", "ranks", int32(9, 0, -1, 1), r"expected values in \[0, 5\) \(V\), got -1 at index 2"),
    ("medusa_draft", "embedding", None, "expected a tensor beside roots, got none"),
    ("medusa_draft", "lm_head", normal(3, 5, 6), "expected .+, got .+"),
    ("medusa_draft", "hidden", torch.full((2, 6), torch.nan), "expected logits without .+, got NaN in head 0 of seq"),
    ("medusa_draft", "hidden", normal(2, 0), "expected d >= 1, got shape"),
    ("sample", "uniforms", None, "expected a tensor at temperature 0.7, got none"),
    ("rotary_append", "positions", int32(0, 1, 2, 3, 4, 9).view(2, 3), r"expected .+ \[0, 9\), got 9 at index"),
    ("rotary_append", "slots", int32(0, 1, 2, 3, 4, 8).view(2, 3), r"expected .+ \[-1, 8\), got 8 at index \[1, 2\]"),
    ("rotary_append", "slots", int32(-2, 1, 2, 3, 4, 5).view(2, 3), r"expected .+ \[-1, 8\), got -2 at index"),
    ("sample", "logits", normal(2, 3, 0), r"expected shape \[\.\.\., V\] with V >= 1, got shape \[2, 3, 0\]"),
    ("sample", "logits", flawed(4, torch.nan), "expected a number and no NaN or inf in each row, got NaN in row 4"),
    ("sample", "logits", flawed(1, torch.inf), "expected a number and no NaN or inf in each row, got inf in row 1"),
    ("sample", "uniforms", uniforms(1.0), r"expected values in \[0, 1\), got 1 in row 2"),
    ("sample", "uniforms", uniforms(-1e-300), r"expected values in \[0, 1\), got -1e-300 in row 2"),
    ("sample", "uniforms", uniforms(torch.nan), r"expected values in \[0, 1\), got nan in row 2"),
    ("sample", "temperature", -0.1, "expected a finite number of 0 or more, got -0.1"),
    ("sample", "temperature", torch.inf, "expected a finite number of 0 or more, got inf"),
    ("sample", "temperature", torch.nan, "expected a finite number of 0 or more, got nan"),
    ("sample", "top_k", -1, "expected 0 or more, got -1"),
    ("sample", "top_p", 0.0, r"expected a number in \(0, 1\], got 0"),
    ("sample", "top_p", torch.nan, r"expected a number in \(0, 1\], got nan"),
    ("sample", "min_p", 1.5, r"expected a number in \[0, 1\], got 1.5"),
    ("sampling_probs", "logits", normal(0, 0), r"expected shape \[\.\.\., V\] with V >= 1, got shape \[0, 0\]"),
    ("sampling_probs", "logits", torch.full((2, 9), -torch.inf), "expected a number .+, got -inf only in row 0"),
    ("sampling_probs", "top_p", 1.5, r"expected a number in \(0, 1\], got 1.5"),
    ("sampling_probs", "min_p", -0.5, r"expected a number in \[0, 1\], got -0.5"),
    ("rotary", "positions", int32(-1, 1, 2, 3, 4, 5).view(2, 3), r"expected values in \[0, 9\), got -1 at index"),
    ("pack_ancestors", "parents", int32(0, 0, -1, 0).view(2, 2), r"expected -1 .+ first.+, got 0 at index \[0, 0\]"),
    ("pack_ancestors", "parents", int32(-3, -2)[None], r"expected -1 .+ first.+, got -3 at index \[0, 0\]"),
    ("pack_ancestors", "parents", int32(-1, 0, 2)[None], r"expected an earlier node.+, got 2 at index \[0, 2\]"),
    ("pack_ancestors", "parents", int32(-1, -1)[None], r"expected an earlier node.+, got -1 at index \[0, 1\]"),
    ("pack_ancestors", "parents", int32(-1, -3)[None], r"expected an earlier node.+, got -3 at index \[0, 1\]"),
    ("pack_ancestors", "parents", int32(-1, -2, 1)[None], r"expected a parent that is not padding, got 1 at .+2\]"),
    ("pack_ancestors", "parents", int32(-2, -2, 0)[None], r"expected a parent that is not padding, got 0 at .+2\]"),
    ("verify_greedy", "parents", int32(-1, 0, 0, 1, 1, 2, 6)[None], r"expected an earlier node.+, got 6 at .+ 6\]"),
    ("verify_greedy", "target_tokens", flawed(4, torch.nan)[:, :, None], "expected .+, got .+"),
    ("verify_greedy", "target_tokens", torch.full((2, 7, 5), torch.nan), "expected a number .+, got NaN in row 0"),
    ("verify_rejection", "siblings", "beam", "expected iid, without_replacement or deterministic, got beam"),
    ("verify_rejection", "draft_probs", None, "expected a tensor for siblings = iid, got none"),
    ("verify_rejection", "target_probs", torch.zeros(2, 7, 5), r"expected a row with a positive.+, got 0 at .+\[0, 0"),
    ("verify_rejection", "draft_probs", torch.zeros(2, 7, 5), r"expected a row with a positive.+, got 0 at .+\[0, 1"),
    ("verify_rejection", "target_probs", torch.full((2, 7, 5), torch.inf), r"expected a row with .+, got inf at"),
    ("verify_rejection", "target_probs", normal(2, 7, 5), r"expected probabilities of 0 or more, got -.+ at .+\[0, 0"),
    ("verify_rejection", "draft_probs", 0 / torch.zeros(2, 7, 5), r"expected probabilities .+, got -?nan at .+ 0\]"),
    ("verify_rejection", "draft_tokens", torch.full((2, 7), 5), r"expected values in .+, got 5 at index \[0, 1\]"),
    ("verify_rejection", "uniforms", torch.ones(2, 8).double(), r"expected values in .0, 1\), got 1 at index \[0, 0"),
    ("verify_typical", "uniforms", torch.tensor([0.0, torch.nan]).double(), r"expected .+, got nan at index \[1\]"),
    ("verify_typical", "uniforms", torch.tensor([0.0, -1e-9]).double(), r"expected .+, got -1e-09 at index \[1\]"),
    ("verify_typical", "draft_tokens", torch.full((2, 7), -1), r"expected values in .+, got -1 at index \[0, 1\]"),
    ("verify_typical", "epsilon", -0.1, r"expected a number in \[0, 1\], got -0.1"),
    ("topk_routing", "k", 0, r"expected a number in \[1, 4\] \(experts of topk_group groups\), got 0"),
    ("topk_routing", "k", 5, r"expected a number in \[1, 4\] .+, got 5"),
    ("topk_routing", "scoring", "cosine", "expected softmax or sigmoid, got cosine"),
    ("topk_routing", "scale", torch.inf, "expected a finite number, got inf"),
    ("topk_routing", "scale", torch.nan, "expected a finite number, got nan"),
    ("topk_routing", "groups", 3, "expected a divisor of E = 8, got 3"),
    ("topk_routing", "groups", 0, "expected a divisor of E = 8, got 0"),
    ("topk_routing", "topk_group", 5, r"expected a number in \[1, 4\] \(groups\), got 5"),
    ("topk_routing", "topk_group", 0, r"expected a number in \[1, 4\] \(groups\), got 0"),
    ("topk_routing", "group_score", "mean", "expected max or top2, got mean"),
    ("topk_routing", "logits", normal(3, 0), r"expected E in \[1, 16777216\], got shape \[3, 0\]"),
    ("moe_sort", "num_experts", 0, r"expected a number in \[1, 16777216\], got 0"),
    ("moe_sort", "ids", int32(2, 0, 3, -2, 0, 2).view(3, 2), r"expected .+ \[-1, 4\), got -2 at index \[1, 1\]"),
    ("moe_sort", "ids", int32(2, 0, 4, -1, 0, 2).view(3, 2), r"expected .+ \[-1, 4\), got 4 at index \[1, 0\]"),
    ("moe_permute", "num_experts", -1, "expected a number in .+, got -1"),
    ("moe_permute", "ids", int32(2, 0, 3, -1, 4, 2).view(3, 2), r"expected .+ \[-1, 4\), got 4 at index \[2, 0\]"),
    ("moe_unpermute", "inverse", int32(2, 0, 3, -1, 5, 2).view(3, 2), r"expected .+ \[-1, 5\) .+, got 5 at .+\[2, 0\]"),
    ("moe_unpermute", "inverse", int32(2, 0, 3, -2, 0, 2).view(3, 2), r"expected values .+, got -2 at index \[1, 1\]"),
    ("grouped_mm", "offsets", int32(2, 1, 5), "expected ends that do not decrease from 2, got 1 at index 1"),
    ("grouped_mm", "offsets", int32(-1, 1, 5), "expected ends that do not decrease from 0, got -1 at index 0"),
    ("grouped_mm", "offsets", int32(2, 4, 7), r"expected values up to 6 \(N\), got 7 at index 2"),
    ("grouped_mm", "in_sizes", int32(5, 6, 4), r"expected values in \[0, 5\] \(d\), got 6 at index 1"),
    ("grouped_mm", "out_sizes", int32(7, 6, -1), r"expected values in \[0, 7\] \(f\), got -1 at index 2"),
    ("grouped_mm_weight_gradient", "offsets", int32(2, 1, 5), "expected .+ not decrease from 2, got 1 at .+ 1"),
    ("grouped_mm_weight_gradient", "out_sizes", int32(7, 8, 0), r"expected values in \[0, 7\] \(f\), got 8 at index 1"),
    ("fused_experts", "activation", "tanh", "expected silu, gelu, gelu_tanh, relu2 or swiglu_oai, got tanh"),
    ("fused_experts", "gated", False, "expected False without a gate, got True"),
    ("fused_experts", "ids", int32(2, 0, 3, -1, 4, 2).view(3, 2), r"expected .+ \[-1, 4\), got 4 at index \[2, 0\]"),
    ("fused_experts", "scale_down", None, "expected a tensor beside scale_gate_up, got none"),
    ("fused_experts", "scale_gate_up", None, "expected dtype float32 like x, got int8"),
    ("verify_typical", "delta", torch.nan, r"expected a number in \[0, 1\], got nan"),
]  # fmt: skip


@pytest.mark.parametrize("name, argument, value, says", VALUES)
def test_wrong_value(name, argument, value, says):
    op = getattr(torch.ops.effops, name).default
    blamed = {
        "max_kv_len": "kv_lens", "max_q_len": "cu_seqlens_q", "gated": "interleaved", "scale_gate_up": "w_gate_up",
        "bits": "bits|labels", "recent": "recent|positions", "kv_lens": "kv_lens|kept",
    }.get(argument, argument if argument != "window" or value < 2**62 else "pages")  # fmt: skip
    refused(op, CALLS[name]() | {argument: value}, blamed, says)


def test_a_tree_larger_than_its_mask():
    call = CALLS["tree_attention"]() | {"cu_seqlens_q": int32(0, 5, 6), "max_q_len": None}
    says = "expected at least 5 rows, those of sequence 0, got 4"
    refused(torch.ops.effops.tree_attention.default, call, "ancestors", says)


def test_depths_without_a_tree():
    call = CALLS["decoder_layer"]() | {"ancestors": None}
    refused(torch.ops.effops.decoder_layer.default, call, "depths", "expected none without ancestors, got a tensor")


def test_windows_of_two_kinds():
    refused(torch.ops.effops.attention.default, CALLS["attention"]() | {"window": 3}, "head_windows")
    refused(torch.ops.effops.attention.default, CALLS["attention"]() | {"window": -1, "head_windows": None}, "window")


def with_level(call: dict[str, Any], name: str, level: int, x: Tensor) -> dict[str, Any]:
    return call | {name: [x if i == level else old for i, old in enumerate(call[name])]}


def test_levels_of_a_cascade():
    op, call = torch.ops.effops.cascade_attention.default, CALLS["cascade_attention"]()
    refused(op, call | {n: [] for n in ("k", "v", "lens", "group_indptr", "page_tables")}, "k")
    for name in ("v", "lens", "group_indptr", "page_tables"):
        refused(op, call | {name: call[name][:1]}, name, "expected a tensor for each of 2 levels, got 1")
    refused(op, call | {"causal": True}, "ancestors", "expected None beside causal, got a tensor")
    refused(op, call | {"ancestors": None}, "depths", "expected None without ancestors, got a tensor")
    for level in (0, 1):
        k, lens, rows = (call[name][level] for name in ("k", "lens", "group_indptr"))
        for name in ("k", "v"):
            x = call[name][level]
            for wrong in (x.double(), x[0], x[..., :-1], x[:, :, :1], x.to("meta")):
                refused(op, with_level(call, name, level, wrong))
        for wrong in (lens.long(), lens[:0], lens[None], lens + 90, lens - 90, lens.to("meta")):
            refused(op, with_level(call, "lens", level, wrong))
        for wrong in (rows.long(), rows[:0], rows[None], rows + 1, rows * 9, rows.flip(0), rows.to("meta")):
            refused(op, with_level(call, "group_indptr", level, wrong))
        assert str(level) in _error(op, with_level(call, "k", level, k[0]))
        refused(op, with_level(call, "k", level, k.clone().requires_grad_()), "k")
    table = call["page_tables"][1]
    for wrong in (table.long(), table[0], table[:1], table + 9, table[None], table.to("meta")):
        refused(op, with_level(call, "page_tables", 1, wrong))


def _error(op: Any, call: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        op(**call)
    return str(error.value)


def test_norm_and_gated_exclude_each_other():
    call = CALLS["packed_linear"]()
    both = call | {"x": normal(3, 16), "gated": True}
    refused(torch.ops.effops.packed_linear.default, both, "norm", "expected none beside gated, got a tensor")
    refused(torch.ops.effops.packed_linear.default, call | {"gated": True, "norm": None}, "x")


def test_more_kv_heads_than_the_projection_has():
    call = CALLS["rotary_append"]()
    caches = {n: call[n].expand(-1, -1, 3, -1) for n in ("k_cache", "v_cache")}
    refused(torch.ops.effops.rotary_append.default, call | caches, "k_cache", "expected G up to 2 .+, got shape")


def test_heads_must_divide():
    call = CALLS["attention"]()
    refused(torch.ops.effops.attention.default, call | {"q": normal(2, 3, 5, 8)}, "k")
    refused(torch.ops.effops.attention.default, call | {"k": call["k"][:, :, :0], "v": call["v"][:, :, :0]}, "k")
    refused(torch.ops.effops.attention.default, call | {"q": call["q"][..., :0], "k": call["k"][..., :0]}, "q")
