"""Fake kernels, autograd and refusals of all ops: the one place where they are registered.

The kernels and schemas are C++ (``csrc/ops``). Python kernels at the autograd keys cost microseconds, so the
public functions step below them (``_call.below_autograd``) whenever no gradient can flow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effops.ops._autograd import first_order, needs_grad, tensors
from effops.ops._moe_autograd import MOE_AUTOGRAD

_library = torch.library.Library("effops", "IMPL")


# ---- fake kernels: shapes and dtypes only --------------------------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the fake kernel of an op. Fakes also serve calls that mix a meta tensor with real ones, which they
    refuse as the kernels refuse any other mixture of devices."""
    arguments = [a.name for a in getattr(torch.ops.effops, name).default._schema.arguments]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(arguments, args, strict=False)) | kwargs
            given = tensors(named)
            first, device = next((k, x.device) for k, x in given.items())
            for argument, x in given.items():
                if x.device != device:
                    raise RuntimeError(f"{name}: {argument}: expected the device of {first}, {device}, got {x.device}")
            return fake(*args, **kwargs)

        torch.library.register_fake(f"effops::{name}", checked)
        return fake

    return register


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_fake("attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


@_fake("varlen_attention")
def _varlen_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, k, v)


@_fake("attention_backward")
def _attention_backward_fake(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = q.new_empty((q.shape[0] if options.get("sink_logits") is not None else 0, q.shape[-2]), dtype=_lse_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sinks


@_fake("varlen_attention_backward")
def _varlen_attention_backward_fake(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = cu_seqlens_q.shape[0] - 1 if options.get("sink_logits") is not None else 0
    sinks = q.new_empty((batch, q.shape[-2]), dtype=_lse_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sinks


@_fake("merge_states")
def _merge_states_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


@_fake("paged_attention")
def _paged_attention_fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, k_pages, v_pages)


@_fake("tree_attention")
def _tree_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, k, v)


@_fake("sparse_attention")
def _sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, k, v)


@_fake("cascade_attention")
def _cascade_attention_fake(q: Tensor, k: list[Tensor], v: list[Tensor], *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(q, k[0], v[0])


@_fake("accumulate_mass")
def _accumulate_mass_fake(mass: Tensor, q: Tensor, k: Tensor, lse: Tensor, **_: Any) -> None:
    return None


@_fake("append_evicting")
def _append_evicting_fake(k_cache: Tensor, *_: Tensor, **__: Any) -> None:
    return None


@_fake("merge_kv")
def _merge_kv_fake(k: Tensor, v: Tensor, kept: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], k.shape[2], k.shape[1])
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty(shape, dtype=torch.int32), k.new_empty(shape, dtype=wide)


@_fake("append_labels")
def _append_labels_fake(labels: Tensor, k: Tensor, slots: Tensor, channels: Tensor, **_: Any) -> None:
    return None


@_fake("label_topk")
def _label_topk_fake(
    q: Tensor, labels: Tensor, channels: Tensor, k: int, *, each_head: bool = False, **_: Any
) -> Tensor:
    lists = q.shape[2] if each_head else labels.shape[2]
    return q.new_empty((q.shape[0], lists, k), dtype=torch.int32)


@_fake("append_page_bounds")
def _append_page_bounds_fake(low: Tensor, high: Tensor, k: Tensor, slots: Tensor, page: int) -> None:
    return None


@_fake("page_topk")
def _page_topk_fake(
    q: Tensor, low: Tensor, high: Tensor, pages: int, page: int, *, each_head: bool = False, **_: Any
) -> Tensor:
    lists = q.shape[2] if each_head else low.shape[2]
    return q.new_empty((q.shape[0], lists, pages * page), dtype=torch.int32)


@_fake("pim_gemv")
def _pim_gemv_fake(x: Tensor, banks: Tensor, out_features: int, sum_values: int, lanes: int, **_: Any) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], x.shape[1], out_features, -(-x.shape[2] // sum_values)), dtype=wide)


@_fake("append_kv")
def _append_kv_fake(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, page_table: Tensor | None = None
) -> None:
    return None


@_fake("commit_kv")
def _commit_kv_fake(
    k_cache: Tensor, v_cache: Tensor, nodes: Tensor, starts: Tensor, *, page_table: Tensor | None = None
) -> None:
    return None


@_fake("packed_linear")
def _packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("decoder_layer")
def _decoder_layer_fake(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


@_fake("decoder")
def _decoder_fake(tokens: Tensor, embedding: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    lm_head = named["lm_head"] if "lm_head" in named else rest[11]
    hidden = embedding.new_empty((*tokens.shape, embedding.shape[1]))
    return hidden, embedding.new_empty((*tokens.shape, lm_head.shape[0]))


@_fake("rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


@_fake("rotary")
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_fake("rotary_append")
def _rotary_append_fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    page_table: Tensor | None = None,
) -> Tensor:
    batch, tokens, heads, dim = qkv.shape
    return qkv.new_empty((batch, tokens, heads - 2 * k_cache.shape[2], dim))


@_fake("silu_mul")
def _silu_mul_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_fake("sample")
def _sample_fake(logits: Tensor, uniforms: Tensor | None = None, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


@_fake("sampling_probs")
def _sampling_probs_fake(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=_lse_dtype(logits))


@_fake("medusa_draft")
def _medusa_draft_fake(hidden: Tensor, root: Tensor, depths: Tensor, *_: Any, **__: Any) -> Tensor:
    return root.new_empty((*root.shape, depths.shape[0]))


@_fake("pack_ancestors")
def _pack_ancestors_fake(parents: Tensor) -> tuple[Tensor, Tensor]:
    words = (parents.shape[1] + 63) // 64
    return parents.new_empty((*parents.shape, words), dtype=torch.int64), parents.new_empty(parents.shape)


def _verify_fake(parents: Tensor, draft_tokens: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = draft_tokens.shape[:1]
    nodes, count = (parents.new_empty(shape) for shape in (draft_tokens.shape, batch))
    return nodes, count, draft_tokens.new_empty(batch)


for _name in ("verify_greedy", "verify_rejection", "verify_typical"):
    _fake(_name)(_verify_fake)


@_fake("topk_routing")
def _topk_routing_fake(logits: Tensor, k: int, **_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=_lse_dtype(logits)), logits.new_empty(shape, dtype=torch.int32)


@_fake("moe_sort")
def _moe_sort_fake(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids.new_empty(ids.numel()), ids.new_empty(ids.shape), ids.new_empty(num_experts)


@_fake("moe_permute")
def _moe_permute_fake(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((ids.numel(), x.shape[1])), ids.new_empty(num_experts), ids.new_empty(ids.shape)


@_fake("moe_unpermute")
def _moe_unpermute_fake(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    return y.new_empty((inverse.shape[0], y.shape[1]))


@_fake("grouped_mm")
def _grouped_mm_fake(x: Tensor, w: Tensor, offsets: Tensor, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[2]))


@_fake("grouped_mm_weight_gradient")
def _grouped_mm_weight_gradient_fake(x: Tensor, dy: Tensor, offsets: Tensor, **_: Any) -> Tensor:
    return x.new_empty((offsets.shape[0], x.shape[1], dy.shape[1]))


@_fake("fused_experts")
def _fused_experts_fake(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


# ---- autograd ------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Both attention ops. ``keywords`` holds the options; those that are tensors come again, as inputs, after the
    positional ones, so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, name: str, positional: int, keywords: dict[str, Any], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = getattr(torch.ops.effops, name)(*inputs[:positional], **keywords)
        ctx.name, ctx.positional = name, positional
        ctx.tensor_names = [k for k, x in keywords.items() if isinstance(x, Tensor)]
        ctx.options = {k: x for k, x in keywords.items() if k not in ctx.tensor_names}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, lse)
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, out, lse = ctx.saved_tensors
        inputs, named = saved[: ctx.positional], dict(zip(ctx.tensor_names, saved[ctx.positional :], strict=True))
        options = {k: x for k, x in ctx.options.items() if k not in ("max_q_len", "max_kv_len")} | named
        if d_out is None:
            d_out = torch.zeros_like(out)
        op = getattr(torch.ops.effops, f"{ctx.name}_backward")
        dq, dk, dv, d_sinks = op(d_out, d_lse, *inputs[:3], out, lse, *inputs[3:], **options)
        by_name = {"sink_logits": d_sinks.sum(0).float()} if "sink_logits" in named else {}
        return (
            None,
            None,
            None,
            dq,
            dk,
            dv,
            *[None] * (len(inputs) - 3),
            *[by_name.get(k) for k in ctx.tensor_names],
        )


def _attention_autograd(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.effops, name).default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not needs_grad(args, kwargs):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args, **kwargs)
        return _Attention.apply(name, len(args), kwargs, *args, *[x for x in kwargs.values() if isinstance(x, Tensor)])

    return kernel


class _MergeStates(torch.autograd.Function):
    """out = sum_p w_p out_p with w_p = exp(lse_p - lse), lse = log sum_p exp(lse_p)."""

    @staticmethod
    def forward(ctx: Any, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.effops.merge_states(outs, lses)
        ctx.save_for_backward(outs, lses, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor, Tensor]:
        outs, lses, out, lse = ctx.saved_tensors
        weights = torch.where(lses.isneginf(), 0.0, (lses - torch.where(lse.isneginf(), 0.0, lse)).exp())
        d_outs, d_lses = torch.zeros_like(outs), torch.zeros_like(lses)
        if d_out is not None:
            d_outs = (weights.unsqueeze(-1) * d_out).to(outs.dtype)
            d_lses = weights * ((outs - out).to(lses.dtype) * d_out.to(lses.dtype)).sum(-1)
        if d_lse is not None:
            d_lses = d_lses + weights * d_lse
        return d_outs, d_lses


def _merge_states_autograd(outs: Tensor, lses: Tensor) -> Any:
    if needs_grad((outs, lses), {}):
        return _MergeStates.apply(outs, lses)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.effops.merge_states.default(outs, lses)


def _refusal(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.effops, name).default
    arguments = [a.name for a in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if needs_grad(args, kwargs):
            named = dict(zip(arguments, args, strict=False)) | kwargs
            culprit = next(k for k, x in tensors(named).items() if x.requires_grad)
            raise RuntimeError(
                f"{name}: {culprit}: expected a tensor that does not require grad, got one that does "
                f"({name} has no gradient: use torch.no_grad(), or the reference)"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    return kernel


def _counts_versions(name: str) -> Callable[..., Any]:
    """The ADInplaceOrView kernel of an op that writes into its caches."""
    op = getattr(torch.ops.effops, name).default
    arguments = [a.name for a in op._schema.arguments]
    written = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(arguments, args, strict=False)) | kwargs
        torch.autograd.graph.increment_version(tuple(named[a.name] for a in written))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*args, **kwargs)

    return kernel


WITHOUT_GRADIENT = (
    "accumulate_mass", "append_evicting", "append_kv", "append_labels", "append_page_bounds", "attention_backward",
    "cascade_attention", "commit_kv", "decoder", "decoder_layer", "grouped_mm_weight_gradient", "label_topk",
    "medusa_draft", "merge_kv", "moe_sort", "pack_ancestors", "packed_linear", "page_topk", "paged_attention",
    "pim_gemv", "rms_norm", "rotary", "rotary_append", "sample", "sampling_probs", "silu_mul", "sparse_attention",
    "tree_attention", "varlen_attention_backward", "verify_greedy", "verify_rejection", "verify_typical",
)  # fmt: skip

for _name in ("attention", "varlen_attention"):
    _library.impl(_name, _attention_autograd(_name), "Autograd")
_library.impl("merge_states", _merge_states_autograd, "Autograd")
for _name, _kernel in MOE_AUTOGRAD.items():
    _library.impl(_name, _kernel, "Autograd")
for _name in WITHOUT_GRADIENT:
    _library.impl(_name, _refusal(_name), "Autograd")
for _name in (
    "accumulate_mass",
    "append_evicting",
    "append_kv",
    "append_labels",
    "append_page_bounds",
    "commit_kv",
    "decoder",
    "decoder_layer",
    "merge_kv",
    "rotary_append",
):
    _library.impl(_name, _counts_versions(_name), "ADInplaceOrView")
