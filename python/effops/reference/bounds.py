"""How far a correct result may lie from the exact one: derived, elementwise error bounds of every op.

Each function takes the arguments of the op of its name, computes the exact result in float64 and returns an
:class:`Interval` a result. The derivations use the standard model of rounding, ``fl(a + b) = (a + b)(1 + d)`` with
``|d| <= u``, and hold for any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3):

    u    unit roundoff of the inputs' dtype       w    that of the compute type: float32, or float64 for float64
    g(n) = n w / (1 - n w), the bound of n chained roundings

For float64 inputs the exact result is itself computed in float64, so its own error is added: the bound is doubled.
Values below the smallest normal float32 may flush to zero; ``FLUSH`` terms account for it. The bounds hold for finite
inputs; what lies outside a sequence's valid keys may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effops.reference.attention import _per_sequence, attention, merge_states
from effops.reference.cache import _row_slices, _unpaged, pack_mask, selected_keys, tree_attention, tree_mask
from effops.reference.layer import int8_rows, packed_linear, rms_norm, rotary, silu_mul

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
FLUSH = 2.0**-126
RESCALE_KEYS = 16  # the running maximum of a softmax changes at most once in so many keys


class Interval(NamedTuple):
    """The exact result and how far a computed one may be from it, float64, elementwise."""

    value: Tensor
    error: Tensor

    def ratio(self, got: Tensor) -> Tensor:
        """|got - value| / error: at most 1 where ``got`` is right; infinite where it is NaN or infinitely far."""
        got = got.to(torch.float64)
        distance = torch.where(got == self.value, 0.0, (got - self.value).abs())  # -inf equals -inf
        return torch.where(distance == 0, 0.0, distance / self.error).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def worst(self, got: Tensor) -> float:
        """The largest ratio; infinite for a wrong shape, 0 for no elements."""
        if got.shape != self.value.shape:
            return torch.inf
        return self.ratio(got).max().item() if got.numel() else 0.0


def _compute_roundoff(dtype: torch.dtype) -> float:
    return ROUNDOFF[dtype] if dtype == torch.float64 else ROUNDOFF[torch.float32]


def _chain(n: Tensor | float, w: float) -> Any:
    return n * w / (1 - n * w)


def _smallest(dtype: torch.dtype) -> float:
    """What rounding a result to the dtype may lose near zero."""
    return 2.0**-25 if dtype == torch.float16 else FLUSH


def _interval(value: Tensor, error: Tensor, dtype: torch.dtype) -> Interval:
    return Interval(value, 2 * error if dtype == torch.float64 else error)


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float64)


def attention_bound(
    q: Tensor, k: Tensor, v: Tensor, *, rounded_scores: bool = False, **options: Any
) -> tuple[Interval, Interval]:
    """out and lse of ``attention``: q [B,T,H,D], k [B,L,G,D], v [B,L,G,Dv], the op's options.

    With n existing keys in a sequence, S the largest of scale · sum_d |q_d||k_d| over them and M = min(S, softcap):

    - a score is off by at most ``g(D + 3) S``, and by 16 w M more through tanh, whose slope is at most 1;
    - a weight exp(s - m) has this as relative error, plus w |s - m| <= 2 w M of the subtraction and 4 w of exp;
      rescaling to a new maximum, at most n / RESCALE_KEYS + 4 times, adds 5 w each time and differences of maxima that
      telescope to |s - m|. Together the weights are right up to a factor in [1 - e, 1 + e], e = expm1(sum);
    - probabilities are rounded to v's dtype (u), both sums have n terms (g(n + 3)), so that numerator and denominator
      bound ``|out' - out| <= A ((1 + e)(1 + u)(1 + g) / ((1 - e)(1 - g)) - 1)`` with A = sum_j p_j |v_j|;
      the result is rounded once more (u);
    - lse takes the denominator's error, and w for each of m, log and their sum.

    A sink is a key without score error; |sink - m| joins the range of scores. ``return_lse`` has no meaning here.
    ``rounded_scores`` allows what our kernels never do and other programs may: products rounded to the inputs' dtype
    before the scale and after it (2 u S).
    """
    batch, capacity = q.shape[0], k.shape[1]
    ends = _per_sequence(options.get("kv_lens"), capacity, batch, q.device)
    starts = _per_sequence(options.get("kv_starts"), 0, batch, q.device).clamp(max=ends)
    return _attention_bound(attention, q, k, v, (starts, ends), rounded_scores, options)


def _attention_bound(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: tuple[Tensor, Tensor],
    rounded_scores: bool,
    options: dict[str, Any],
) -> tuple[Interval, Interval]:
    """The bound of ``attend(q, k, v, **options)``, whatever it masks of the keys [starts, ends) of each sequence."""
    options = {**options, "return_lse": True}
    u, w = ROUNDOFF[q.dtype], _compute_roundoff(q.dtype)
    q64, k64, v64 = (x.detach().to(torch.float64) for x in (q, k, v))
    sinks = options["sink_logits"] = _wide(options.get("sink_logits"))
    out, lse = attend(q64, k64, v64, **options)
    magnitude, _ = attend(q64, k64, v64.abs(), **options)

    capacity, head_dim, group = k.shape[1], q.shape[3], q.shape[2] // k.shape[2]
    scale = abs(head_dim**-0.5 if options.get("scale") is None else options["scale"])
    starts, ends = keys
    j = torch.arange(capacity, device=q.device)
    exists = ((starts[:, None] <= j) & (j < ends[:, None]))[:, :, None, None]
    k_abs, v_abs = (torch.where(exists, x.abs(), 0).repeat_interleave(group, 2) for x in (k64, v64))
    products = torch.einsum("bthd,blhd->bthl", q64.abs(), k_abs)
    largest = scale * torch.nn.functional.pad(products, (0, 1)).amax(-1)
    n = (ends - starts).to(torch.float64)[:, None, None]

    softcap = options.get("softcap") or 0.0
    top = largest.clamp(max=softcap) if softcap else largest
    spread = 2 * top if sinks is None else 2 * top + sinks.abs()
    score = _chain(head_dim + 3, w) * largest + (16 * w * top if softcap else 0.0)
    score = score + scale * head_dim * FLUSH * (q64.abs().amax(-1) + k_abs.amax((1, 3))[:, None]) if capacity else score
    if rounded_scores:
        score = score + 2 * u * largest
    weight = torch.expm1(score + w * (2 * spread + 5 * (n / RESCALE_KEYS + 4) + 8)).clamp(max=1.0)
    sums = _chain(n + 3, w)
    relative = (1 + weight) * (1 + u) * (1 + sums) / ((1 - weight) * (1 - sums)) - 1
    flush = FLUSH * (n * v_abs.amax((1, 3))[:, None] + 2)[..., None] if capacity else FLUSH
    out_error = magnitude * ((1 + relative) * (1 + u) - 1)[..., None] + flush + _smallest(q.dtype)

    finite = torch.where(lse.isfinite(), lse.abs(), 0.0)
    lse_error = -torch.log1p(-weight) - torch.log1p(-sums) + w * (2 * spread + 4 * finite + 8)
    empty = lse == -torch.inf
    out_error = torch.where(empty[..., None], 0.0, out_error)
    return _interval(out, out_error, q.dtype), _interval(lse, torch.where(empty, 0.0, lse_error), q.dtype)


def paged_attention_bound(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, **options: Any
) -> tuple[Interval, Interval]:
    """out and lse of ``paged_attention``: each sequence's and KV head's bound."""
    return _cached_bound(attention, q, k_pages, v_pages, page_table=page_table, kv_lens=kv_lens, **options)


def tree_attention_bound(
    q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor, **options: Any
) -> tuple[Interval, Interval]:
    """out and lse of ``tree_attention``: each sequence's and KV head's bound."""
    return _cached_bound(tree_attention, q, k, v, ancestors=ancestors, **options)


def sparse_attention_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    page_table: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    **_: Any,
) -> tuple[Interval, Interval]:
    """out and lse of ``sparse_attention``: each query head's bound over the tokens of its list."""
    out, lse = (Interval(*(q.new_zeros(shape, dtype=torch.float64) for _ in range(2)))
                for shape in ((*q.shape[:-1], v.shape[-1]), q.shape[:-1]))  # fmt: skip
    heads = q.shape[2]
    for b in range(q.shape[0]):
        for h in range(heads):
            keys, values = selected_keys(k, v, indices, page_table, b, h, heads // k.shape[2])
            parts = attention_bound(
                q[b : b + 1, :, h : h + 1], keys[None, :, None], values[None, :, None],
                sink_logits=None if sink_logits is None else sink_logits[h : h + 1], softcap=softcap, scale=scale,
            )  # fmt: skip
            for to, x in zip((*out, *lse), (*parts[0], *parts[1]), strict=True):
                to[b, :, h : h + 1] = x[0]
    return out, lse


def cascade_attention_bound(
    q: Tensor,
    levels: Sequence[Any],
    *,
    causal: bool = False,
    ancestors: Tensor | None = None,
    depths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> tuple[Interval, Interval]:
    """out and lse of ``cascade_attention``: the levels' own bounds, weighted as the merge does, whose weights their lse
    errors move (twice: lse of a part and of the whole); the merge's own error; one rounding of the result."""
    parts = []
    own_mask: dict[str, Any] = {"causal": causal} if ancestors is None else {"ancestors": ancestors, "depths": depths}
    for i, (k, v, lens, group_indptr, page_table) in enumerate(levels):
        mask: dict[str, Any] = {"page_table": page_table}
        if i == len(levels) - 1:
            mask |= {"sink_logits": sink_logits, **own_mask}
        attend = tree_attention if "ancestors" in mask else attention
        parts.append(_cached_bound(attend, q, k, v, kv_lens=lens, cu_seqlens_q=group_indptr, **mask, **options))
    values, errors = ([torch.stack([p[i][j] for p in parts]) for i in (0, 1)] for j in (0, 1))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    own, own_lse = merge_states_bound(values[0].to(wide), values[1].to(wide))
    out, lse = merge_states(*values)
    if len(parts) == 1:
        return parts[0]
    off, size = (merge_states(x, values[1])[0] for x in (errors[0], values[0].abs()))
    moved = torch.expm1(2 * errors[1].amax(0))[..., None]
    error = (off + size * moved) * (1 + moved) + own.error
    return (
        _interval(out, error + ROUNDOFF[q.dtype] * (out.abs() + error) + _smallest(q.dtype), wide),
        _interval(lse, errors[1].amax(0) + own_lse.error, wide),
    )


def _cached_bound(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    kv_lens: Tensor | None = None,
    **options: Any,
) -> tuple[Interval, Interval]:
    for name in ("return_lse", "max_q_len", "max_kv_len"):
        options.pop(name, None)
    rounded_scores = options.pop("rounded_scores", False)
    out, lse = (Interval(*(q.new_zeros(shape, dtype=torch.float64) for _ in range(2)))
                for shape in ((*q.shape[:-1], v.shape[-1]), q.shape[:-1]))  # fmt: skip
    lse.value.fill_(-torch.inf)
    kv_heads = k.shape[2]
    group = q.shape[-2] // kv_heads
    rows = [_row_slices(x, cu_seqlens_q) for x in (q, *out, *lse)]
    a_sequence = ("kv_starts", "prefix_lens", "ancestors", "depths")
    for b, (own, *results) in enumerate(zip(*rows, strict=True)):
        tokens = own.shape[0]
        chosen = {n: x[min(b, x.shape[0] - 1) :][:1] if n in a_sequence and x is not None and x.shape[0] else x
                  for n, x in options.items()}  # fmt: skip
        if "ancestors" in options:
            mask = tree_mask(chosen["ancestors"])[:, :tokens, :tokens]
            chosen["ancestors"] = pack_mask(mask)
            chosen["depths"] = mask.sum(-1) - 1 if chosen.get("depths") is None else chosen["depths"][:, :tokens]
        start = int(chosen["kv_starts"][0]) if chosen.get("kv_starts") is not None else 0
        for g in range(kv_heads):
            heads = slice(g * group, (g + 1) * group)
            end = k.shape[1] if kv_lens is None else int(kv_lens[b] if kv_lens.dim() == 1 else kv_lens[b, g])
            if page_table is None:
                own_k, own_v = (x[b : b + 1, :end, g : g + 1] for x in (k, v))
            else:
                own_k, own_v = _unpaged(k, v, page_table, b, g, end, start)
            alone = dict(chosen)
            if alone.get("head_windows") is not None:
                alone["head_windows"] = alone["head_windows"][g : g + 1]
            if alone.get("sink_logits") is not None:
                alone["sink_logits"] = alone["sink_logits"][heads]
            limits = torch.tensor([min(start, end)]), torch.tensor([end])
            part = _attention_bound(attend, own[None, :, heads], own_k, own_v, limits, rounded_scores, alone)
            for to, x in zip(results, (*part[0], *part[1]), strict=True):
                to[:, heads] = x[0]
    return out, lse


def varlen_attention_bound(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> tuple[Interval, Interval]:
    """out and lse of ``varlen_attention``: each sequence's bound; rows of no sequence are exactly 0 and -inf."""
    rows, heads, v_dim = q.shape[0], q.shape[1], v.shape[2]
    out, lse = (Interval(*(q.new_zeros(shape, dtype=torch.float64) for _ in range(2)))
                for shape in ((rows, heads, v_dim), (rows, heads)))  # fmt: skip
    lse.value.fill_(-torch.inf)
    per_sequence = ("kv_starts", "prefix_lens")
    offsets_q, offsets_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(offsets_q) - 1):
        own = {name: x[b : b + 1] if name in per_sequence and x is not None else x for name, x in options.items()}
        own.pop("max_q_len", None)
        mine, keys = slice(offsets_q[b], offsets_q[b + 1]), slice(offsets_k[b], offsets_k[b + 1])
        for whole, part in zip((out, lse), attention_bound(q[None, mine], k[None, keys], v[None, keys], **own),
                               strict=True):  # fmt: skip
            whole.value[mine], whole.error[mine] = part.value[0], part.error[0]
    return out, lse


def merge_states_bound(outs: Tensor, lses: Tensor) -> tuple[Interval, Interval]:
    """out and lse of ``merge_states``: outs [P,...,D], lses [P,...].

    A weight exp(lse_p - lse) takes w for each of the logarithm, exp and their rounding, and w |lse| for every sum and
    difference of logarithms; the weighted sum has P terms.
    """
    u, w, parts = ROUNDOFF[outs.dtype], _compute_roundoff(outs.dtype), outs.shape[0]
    o64, l64 = outs.detach().to(torch.float64), lses.detach().to(torch.float64)
    out, lse = merge_states(o64, l64)
    magnitude, _ = merge_states(o64.abs(), l64)
    largest = torch.where(l64.isfinite(), l64.abs(), 0.0).amax(0)
    lse_error = w * (4 * largest + parts + 16)
    relative = (1 + torch.expm1(2 * lse_error)) * (1 + _chain(parts + 2, w)) * (1 + u) - 1
    out_error = magnitude * relative[..., None] + parts * FLUSH * (1 + magnitude) + _smallest(outs.dtype)
    empty = lse == -torch.inf
    out_error = torch.where(empty[..., None], 0.0, out_error)
    return _interval(out, out_error, outs.dtype), _interval(lse, torch.where(empty, 0.0, lse_error), outs.dtype)


def packed_linear_bound(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    gated: bool = False,
    activation: str | None = None,
) -> Interval:
    """``packed_linear``: sums of K products and two addends (g(K + 3)); the result is rounded (u). On torch's GEMM
    path, which more than 16 rows take, so may be the product before its bias and their sum before the residual.
    The error of ``norm`` or ``gated``, rounded to the dtype, passes through the absolute weights.

    A quantised weight's numbers and zero, int8's plus 128, are summed apart, a step and a difference a group:
    K + 2 groups + 6 roundings of |scale| (|number| + |zero|). With ``activation`` "int8", which takes no f before,
    products of numbers are exact: the same bound holds, of rows of int8."""
    u, w, features = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype), weight.shape[-1]
    quantized = getattr(weight, "quantized_shape", None) is not None
    before = Interval(x.detach().to(torch.float64), x.new_zeros((), dtype=torch.float64))
    if norm is not None:
        before = rms_norm_bound(x, norm, norm_eps)
    if gated:
        before = silu_mul_bound(x)
    if activation is not None:
        before = Interval(int8_rows(x.detach(), weight.group_size), before.error)
    x64, b64, r64 = before.value, _wide(bias), _wide(residual)
    w64, sizes, roundings = _quantized_sizes(weight) if quantized else _plain_sizes(weight)
    product = packed_linear(x64, w64)
    biased = product if b64 is None else product + b64
    value = biased if r64 is None else biased + r64
    absolute = [None if t is None else t.abs() for t in (b64, r64)]
    largest_x = x64.abs() + before.error
    magnitude = packed_linear(largest_x, sizes, absolute[0], residual=absolute[1])
    passed = packed_linear(before.error.expand_as(x64), w64.abs())
    sums = _chain(features + roundings, w) * magnitude
    inner = torch.zeros_like(value)
    if math.prod(x.shape[:-1]) > 16 and not quantized:
        inner += 0 if bias is None else u * (product.abs() + passed + sums)
        inner += 0 if residual is None else u * (biased.abs() + passed + sums + inner)
    largest = largest_x.amax() + sizes.amax() if x.numel() and w64.numel() else 0.0
    error = (passed + sums + inner) * (1 + u) + u * value.abs() + FLUSH * (features * largest + 1) + _smallest(x.dtype)
    return _interval(value, error, x.dtype)


def _plain_sizes(weight: Any) -> tuple[Tensor, Tensor, int]:
    """The weight, what its products are of the size of, and the roundings beside those of K sums."""
    w64 = (weight if isinstance(weight, Tensor) else weight.data).detach().to(torch.float64)
    return w64, w64.abs(), 3


def _quantized_sizes(weight: Any) -> tuple[Tensor, Tensor, int]:
    numbers, scales, zeros = (t.to(torch.float64) for t in weight.numbers())
    if numbers.numel() == 0:
        return numbers, numbers, 3
    groups = scales.shape[1]
    each, scale, zero = numbers.unflatten(1, (groups, -1)), scales[..., None], zeros[..., None]
    stored = 128 if weight.format == "int8" else 0
    w64, sizes = (each - zero) * scale, scale.abs() * ((each + stored).abs() + (zero + stored).abs())
    return weight.in_order(w64.flatten(1)), weight.in_order(sizes.flatten(1)), 2 * groups + 6


def rms_norm_bound(x: Tensor, weight: Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Interval:
    """``rms_norm``: the mean square has D positive terms (g(D + 3), halved by the root), then root, division, the
    weight's offset and two products round once each; the result is rounded to the dtype."""
    u, w = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    value = rms_norm(x.detach().to(torch.float64), weight.detach().to(torch.float64), eps, weight_offset=weight_offset)
    relative = (1 + _chain(x.shape[-1] + 3, w) + 8 * w) * (1 + u) - 1
    return _interval(value, relative * value.abs() + _smallest(x.dtype), x.dtype)


def rotary_bound(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Interval:
    """``rotary``: two products and their sum round (3 w of the absolute sum), then the result; the dimensions from R
    on are copies."""
    u, w, turned = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype), 2 * cos.shape[1]
    wide, c, s = x.detach().to(torch.float64), cos.detach().to(torch.float64), sin.detach().to(torch.float64)
    value = rotary(wide, c, s, positions)
    # |a c| + |b s| and |b c| + |a s|: the rotation of absolute values, with the sign of the first half's sine turned.
    a, b = wide[..., : turned // 2].abs(), wide[..., turned // 2 : turned].abs()
    c, s = (t.abs()[positions.long()][:, :, None, :] for t in (c, s))
    magnitude = torch.cat([a * c + b * s, b * c + a * s], -1)
    error = torch.zeros_like(value)
    error[..., :turned] = 3 * w * magnitude * (1 + u) + u * value[..., :turned].abs() + _smallest(x.dtype)
    return _interval(value, error, x.dtype)


def rotary_append_bound(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> tuple[Interval, Interval]:
    """The queries and the keys of ``rotary_append`` [B,T,H,D], [B,T,G,D]: those of ``rotary``. Values are copies."""
    kv_heads = k_cache.shape[2]
    q, k, _ = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
    return rotary_bound(q, cos, sin, positions), rotary_bound(k, cos, sin, positions)


def silu_mul_bound(x: Tensor) -> Interval:
    """``silu_mul``: exp (4 w), sum, division and two products; where exp overflows the gate flushes to zero."""
    u, w = ROUNDOFF[x.dtype], _compute_roundoff(x.dtype)
    wide = x.detach().to(torch.float64)
    value = silu_mul(wide)
    gate, up = wide.chunk(2, -1)
    relative = (1 + 12 * w) * (1 + u) - 1
    return _interval(value, relative * value.abs() + FLUSH * gate.abs() * up.abs() + _smallest(x.dtype), x.dtype)
