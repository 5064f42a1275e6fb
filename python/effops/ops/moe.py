"""Mixture of experts: routing, the moves into expert order and back, products by expert, the whole layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effops.ops._call import BelowAutograd, dispatches
from effops.ops._invariance import is_batch_invariant
from effops.ops.packed_experts import PackedExperts

_topk_routing = torch.ops.effops.topk_routing.default
_moe_sort = torch.ops.effops.moe_sort.default
_moe_permute = torch.ops.effops.moe_permute.default
_moe_unpermute = torch.ops.effops.moe_unpermute.default
_grouped_mm = torch.ops.effops.grouped_mm.default
_grouped_mm_weight_gradient = torch.ops.effops.grouped_mm_weight_gradient.default
_fused_experts = torch.ops.effops.fused_experts.default


def _given(**options: Any) -> dict[str, Any]:
    """Without what is None: an argument costs 0.2 µs."""
    return {name: x for name, x in options.items() if x is not None}


def topk_routing(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    groups: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights.

    Scores s are the softmax over all experts, or sigmoids. Experts are selected by s + bias, in descending order,
    ties to the lowest id; weights are s itself, divided by the sum over the k (sigmoid: plus 1e-20) where
    ``renormalize``, times ``scale``. Scores that differ by less than their rounding may come in either order.

    Args:
        logits: ``[N, E]``, float32, bfloat16, float16 or float64, any strides. A NaN makes its row's weights NaN.
        k: in ``[1, E]``; with groups, at most the experts of ``topk_group`` groups.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        bias: float32 ``[E]``, counts in the selection only (DeepSeek-V3's balancing, arXiv 2412.19437).
        groups: experts are that many groups of neighbours, of which the ``topk_group`` best ones take part.
        group_score: a group's best selection value, ``"max"``, or the sum of its two best, ``"top2"``.

    Returns:
        weights ``[N, k]``, float32 (float64 for float64 logits), and ids int32 ``[N, k]``, distinct in a row.

    Differentiable in the logits, through the weights; indices are constants. Presets of published models: the
    softmax with ``renormalize`` is Mixtral's (arXiv 2401.04088), the softmax over the chosen logits.
    """
    options: dict[str, Any] = _given(bias=bias)
    if scoring != "softmax":
        options["scoring"] = scoring
    if not renormalize:
        options["renormalize"] = False
    if scale != 1:
        options["scale"] = scale
    if not groups == topk_group == 1 or group_score != "max":
        options |= {"groups": groups, "topk_group": topk_group, "group_score": group_score}
    if dispatches(logits, bias):
        weights, ids = _topk_routing(logits, k, **options)
    else:
        with BelowAutograd():
            weights, ids = _topk_routing(logits, k, **options)
    return weights, ids


def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots in the order of their experts, by a stable counting sort. Slot ``t * K + j`` is choice j of token t.

    Args:
        ids: int32 ``[N, K]`` in ``[-1, num_experts)``, any strides; -1 is dropped: sorts last, has no place.

    Returns:
        order int32 ``[N * K]``, the slot at each place; inverse int32 ``[N, K]``, the place of each slot or -1;
        offsets int32 ``[num_experts]``, the end of each expert's places. No gradient.
    """
    if dispatches(ids):
        order, inverse, offsets = _moe_sort(ids, num_experts)
    else:
        with BelowAutograd():
            order, inverse, offsets = _moe_sort(ids, num_experts)
    return order, inverse, offsets


def moe_permute(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of x in the order of :func:`moe_sort`: one for each kept choice, sorted by expert.

    Args:
        x: ``[N, d]``, float32, bfloat16, float16 or float64; ids: int32 ``[N, K]``, as in :func:`moe_sort`.

    Returns:
        xp ``[N * K, d]``, whose rows past ``offsets[-1]`` are zero, and offsets and inverse of :func:`moe_sort`.

    Differentiable in x.
    """
    if dispatches(x):
        xp, offsets, inverse = _moe_permute(x, ids, num_experts)
    else:
        with BelowAutograd():
            xp, offsets, inverse = _moe_permute(x, ids, num_experts)
    return xp, offsets, inverse


def moe_unpermute(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """``out[t] = sum_j weights[t, j] * y[inverse[t, j]]``, j ascending, in float32 and rounded once.

    Args:
        y: ``[M, d]``, float32, bfloat16, float16 or float64.
        weights: float32 ``[N, K]`` (float64 for float64 y), or None for ones.
        inverse: int32 ``[N, K]`` in ``[-1, M)``; -1 adds nothing, whatever its weight. Places may repeat.

    Returns:
        ``[N, d]``, y's dtype. Differentiable in y and weights.
    """
    if dispatches(y, weights):
        return _moe_unpermute(y, weights, inverse)
    with BelowAutograd():
        return _moe_unpermute(y, weights, inverse)


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    in_sizes: Tensor | None = None,
    out_sizes: Tensor | None = None,
) -> Tensor:
    """A matrix product for each group of rows: ``y[i] = x[i] @ w[e] + bias[e]`` for the rows i of group e.

    Args:
        x: ``[R, d]``, float32, bfloat16, float16 or float64, any strides.
        w: ``[E, d, f]``, x's dtype, any strides; a transposed ``[E, f, d]`` costs no copy.
        offsets: int32 ``[E]``, ascending in ``[0, R]``: the end of each group's rows. No alignment is asked for.
        bias: ``[E, f]``, x's dtype.
        in_sizes, out_sizes: int32 ``[E]``, how many of its d inputs and f outputs a group has. The rest of x and w is
            not read, and y is zero there.

    Returns:
        ``[R, f]``, x's dtype; rows past the last offset are zero. Differentiable in x, w and bias.

    Offsets are those of ``torch.nn.functional.grouped_mm``. A row's bits may depend on the number of rows of its group
    (within the error bound), but under ``effops.batch_invariant(True)``.
    """
    options = _given(bias=bias, in_sizes=in_sizes, out_sizes=out_sizes)
    if is_batch_invariant():
        options["batch_invariant"] = True
    if dispatches(x, w, bias):
        return _grouped_mm(x, w, offsets, **options)
    with BelowAutograd():
        return _grouped_mm(x, w, offsets, **options)


def grouped_mm_weight_gradient(
    x: Tensor, dy: Tensor, offsets: Tensor, *, in_sizes: Tensor | None = None, out_sizes: Tensor | None = None
) -> Tensor:
    """The gradient of :func:`grouped_mm` to w: ``dw[e] = x_e^T dy_e`` over the rows of group e.

    Args:
        x: ``[R, d]``; dy: ``[R, f]``, x's dtype; offsets, in_sizes, out_sizes: as in :func:`grouped_mm`.

    Returns:
        ``[E, d, f]``, x's dtype; zero for groups without rows and beyond the sizes. No gradient of its own.
    """
    options = _given(in_sizes=in_sizes, out_sizes=out_sizes)
    if dispatches(x, dy):
        return _grouped_mm_weight_gradient(x, dy, offsets, **options)
    with BelowAutograd():
        return _grouped_mm_weight_gradient(x, dy, offsets, **options)


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor | PackedExperts,
    w_down: Tensor | PackedExperts,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    scale_gate_up: Tensor | None = None,
    scale_down: Tensor | None = None,
) -> Tensor:
    """A layer of experts after its routing: ``out[t] = sum_j weights[t, j] * expert_{ids[t, j]}(x[t])`` with
    ``expert(x) = W_down (act(gate) * up) + b_down`` and ``gate, up = W_gate_up x + b_gate_up``.

    Args:
        x: ``[N, d]``, float32, bfloat16, float16 or (CPU) float64.
        w_gate_up: ``[E, 2f, d]``, gate rows before up rows, or each gate row before its up row where ``interleaved``;
            ``[E, f, d]``: experts without a gate, ``act(W x)``. x's dtype and any strides, or int8 with a scale.
        w_down: ``[E, d, f]``, likewise. Both may be :class:`PackedExperts`, which bring their scales.
        weights: float32 ``[N, K]`` (float64 for float64 x); ids: int32 ``[N, K]`` in ``[-1, E)``. -1 adds nothing, an
            expert that comes twice adds twice.
        activation: ``"silu"`` (SwiGLU), ``"gelu"``, ``"gelu_tanh"``, ``"relu2"`` (``max(g, 0)^2``), or
            ``"swiglu_oai"``: ``g sigmoid(1.702 g) (u + 1)`` with g up to 7 and u in [-7, 7] (GPT-OSS; needs a gate).
        bias_gate_up: ``[E, 2f]`` (``[E, f]``), bias_down: ``[E, d]``, x's dtype.
        scale_gate_up: float32 ``[E, 2f]``, scale_down: float32 ``[E, d]``: steps of int8 weights by output feature.
            Weights in few bits and groups come as :class:`PackedExperts` alone, on the CPU.

    Returns:
        ``[N, d]``, x's dtype, accumulated in float32.

    Raises:
        RuntimeError: naming the argument, what was expected and what came; int8 for one weight alone is refused.

    Where an input requires grad, the layer is composed of :func:`moe_permute`, :func:`grouped_mm`, torch's activation
    and :func:`moe_unpermute`, and differentiable in all but ids; int8 weights and panels have no gradient.
    """
    options: dict[str, Any] = {}
    gated = w_gate_up.shape[1] != w_down.shape[-1]
    if isinstance(w_down, PackedExperts) and isinstance(w_gate_up, PackedExperts) and w_down.in_few_bits:
        experts, dim, inner = w_down.shape  # the rows of numbers do not say their widths
        fits = w_gate_up.shape in ((experts, 2 * inner, dim), (experts, inner, dim))
        if not fits or x.dim() != 2 or x.shape[1] != dim:
            raise RuntimeError(
                f"fused_experts: x: expected [N, {dim}], and w_gate_up [{experts}, (2) {inner}, {dim}], beside "
                f"w_down {list(w_down.shape)}, got {list(x.shape)} and {list(w_gate_up.shape)}"
            )
    if isinstance(w_down, PackedExperts):
        if w_down.panels_of is not None:
            options["packed_features"] = w_down.shape[2]
        scale_down = w_down.scale
        w_down = w_down.data
    if isinstance(w_gate_up, PackedExperts):
        scale_gate_up = w_gate_up.scale
        w_gate_up = w_gate_up.data
    options |= _given(
        bias_gate_up=bias_gate_up, bias_down=bias_down, scale_gate_up=scale_gate_up, scale_down=scale_down
    )
    if activation != "silu":
        options["activation"] = activation
    if not gated:
        options["gated"] = False
    if interleaved:
        options["interleaved"] = True
    if is_batch_invariant():
        options["batch_invariant"] = True
    if dispatches(x, w_gate_up, w_down, weights, bias_gate_up, bias_down, scale_gate_up, scale_down):
        return _fused_experts(x, w_gate_up, w_down, weights, ids, **options)
    with BelowAutograd():
        return _fused_experts(x, w_gate_up, w_down, weights, ids, **options)
