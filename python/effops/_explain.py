"""The path and the schedule that an op call would take, as text. Nothing runs; torch is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from effops._backends import chosen, device_kernel

_LIKE_ATTENTION = ("paged_attention", "tree_attention")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_DIFFERENTIABLE = "gradient: tiled recompute in the compute type, through out and lse"
_NO_GRADIENT = "gradient: none, the op raises where an input requires grad"
_REFUSED = (
    "gradient: none, the op raises where an input requires grad; "
    "effops.nn takes torch's own operators there (and for float64)"
)


def explain(op: str, *, dtype: str = "float32", **sizes: Any) -> str:
    """Names the backend, loop, splits, tasks, bytes and FLOPs of a call on CPU tensors, one ``name: value`` a line.

    With ``EFFOPS_BACKEND=simt`` attention's schedule is that of the device kernels.

    Args:
        op: an op of :mod:`effops.ops`.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``.
        sizes: attention and varlen_attention: ``batch, q_len, kv_len, heads, kv_heads, head_dim`` and optionally
            ``v_dim, causal, window, num_sinks`` (varlen: sequences of equal length); packed_linear: ``rows, n, k``,
            and of weights in few bits ``bits, group``; pim_gemv: ``batch, rows, n, k, units, values, lanes,
            channels``;
            paged_attention: the same and ``page``; tree_attention: ``batch, q_len`` (nodes)``, kv_len, heads, kv_heads,
            head_dim, v_dim, window, num_sinks``; sparse_attention: ``batch, selected, heads, kv_heads, head_dim, v_dim,
            lists`` (1, KV heads or query heads); cascade_attention: ``batch, q_len, shared_len, kv_len`` (of each
            sequence)``, heads, kv_heads, head_dim, v_dim``; merge_states: ``parts, rows, head_dim``; append_kv,
            commit_kv: ``batch, q_len, kv_heads, head_dim, v_dim``; append_evicting: the same and ``slots``; merge_kv:
            ``batch, slots, kept, kv_heads, head_dim, v_dim``;
            accumulate_mass: ``batch, q_len, kv_len, heads, kv_heads, head_dim``; append_labels: ``batch, q_len,
            kv_heads, channels, bits``; label_topk: ``batch, kv_len, heads, kv_heads, channels, bits, selected,
            lists``; append_page_bounds: ``batch, q_len, kv_heads, head_dim``; page_topk: ``batch, kv_len, heads,
            kv_heads, head_dim, pages`` (of a list)``, page, lists``;
            rms_norm, silu_mul: ``rows, dim`` (of x; silu_mul's is 2f); rotary: ``rows, heads, head_dim``;
            rotary_append: ``rows, heads, kv_heads, head_dim``; decoder_layer: those of attention, and ``width, inner``;
            decoder: the same and ``layers, vocab``; medusa_draft: ``batch, heads, layers, width, vocab``;
            sample, sampling_probs: ``rows, vocab``.
            topk_routing, moe_sort: ``rows, experts, k``; moe_permute: the same and ``dim``; moe_unpermute: ``rows, k,
            dim``; grouped_mm, grouped_mm_weight_gradient: ``rows, groups, n, k`` (k inputs, n outputs); fused_experts:
            ``rows, experts, k, width, inner``.
            pack_ancestors, verify_greedy: ``batch, nodes``; verify_rejection, verify_typical: ``batch, nodes, vocab``
            (their dtypes are fixed).

    Raises:
        ValueError: an unknown op, dtype or size, or sizes that do not fit. RuntimeError: no host module.
    """
    if op not in _EXPLAINED:
        raise ValueError(f"explain: op: expected one of {', '.join(_EXPLAINED)}, got {op!r}")
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"explain: dtype: expected one of {', '.join(_ITEM_BYTES)}, got {dtype!r}")
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"explain: {name}: expected an integer of 0 or more, got {size!r}")
    named = {name: size for name, size in sizes.items() if (op, name) != ("paged_attention", "page")}
    try:
        inspect.signature(_attention if op in _LIKE_ATTENTION else _EXPLAINED[op]).bind(dtype=dtype, **named)
    except TypeError as error:
        raise ValueError(f"explain: {op}: {error}") from None
    path = _EXPLAINED[op](dtype=dtype, **sizes)
    return f"op: {op}\ndtype: {dtype}\n{path}\ndevice_kernel: {device_kernel(op, dtype)}"


def _host() -> ModuleType:
    try:
        from effops import _host
    except ImportError as error:
        raise RuntimeError(f"explain: the host module effops._host is not available: {error}") from None
    return _host


def _attention(
    *,
    dtype: str,
    kv_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    q_len: int = 1,
    v_dim: int = 0,
    causal: bool = False,
    window: int = 0,
    num_sinks: int = 0,
) -> str:
    text: str = _host().explain_attention(
        dtype=dtype, batch=batch, q_len=q_len, kv_len=kv_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        v_dim=v_dim or head_dim, causal=causal, window=window, num_sinks=num_sinks, backend=chosen(),
    )  # fmt: skip
    return text + _DIFFERENTIABLE


def _paged_attention(*, dtype: str, page: int = 16, **sizes: Any) -> str:
    lines = _attention(dtype=dtype, **sizes).removesuffix(_DIFFERENTIABLE)
    return f"{lines}tile_rows: in place, through a list of pointers, over pages of {page} tokens\n{_NO_GRADIENT}"


def _tree_attention(*, dtype: str, **sizes: Any) -> str:
    lines = _attention(dtype=dtype, **sizes).removesuffix(_DIFFERENTIABLE)
    nodes = sizes.get("q_len", 1)
    return f"{lines}mask: {nodes} x {nodes} bits, read for the last {nodes} keys only\n{_NO_GRADIENT}"


def _cascade_attention(
    *, dtype: str, shared_len: int, kv_len: int, batch: int = 1, q_len: int = 1, **sizes: Any
) -> str:
    """A prefix of a whole batch, and each sequence's own keys."""
    rows = batch * q_len
    levels = [(1, rows, shared_len, False), (batch, q_len, kv_len, q_len > 1)]
    lines = [f"backend: {chosen()}", f"isa: {_host().cpu_isa()}"]
    for i, (groups, tokens, keys, causal) in enumerate(levels):
        text = _attention(dtype=dtype, batch=groups, q_len=tokens, kv_len=keys, causal=causal, **sizes)
        own = [line for line in text.removesuffix(_DIFFERENTIABLE).splitlines() if line not in lines]
        lines += [f"level {i}: {line}" for line in own]
    heads, item = sizes["heads"], 8 if dtype == "float64" else 4
    partial = 2 * rows * heads * ((sizes.get("v_dim") or sizes["head_dim"]) + 1) * item
    lines += [f"partial_results_bytes: {partial}", "merge: one pass over the levels by log-sum-exp", _NO_GRADIENT]
    return "\n".join(lines)


def _sparse_attention(*, dtype: str, selected: int, heads: int, kv_heads: int, lists: int = 0, **sizes: Any) -> str:
    each = heads if lists == heads else kv_heads
    lines = _attention(dtype=dtype, kv_len=selected, heads=heads, kv_heads=each, **sizes)
    rows = (
        f"tile_rows: in place, through a list of {selected} tokens for each {'query' if each > kv_heads else 'KV'} head"
    )
    return f"{lines.removesuffix(_DIFFERENTIABLE)}{rows}\n{_NO_GRADIENT}"


def _packed_linear(*, dtype: str, n: int, k: int, rows: int = 1, bits: int = 0, group: int = 0) -> str:
    text: str = _host().explain_linear(dtype=dtype, rows=rows, n=n, k=k)
    if not bits:
        return text + _REFUSED
    if bits not in (4, 8) or dtype == "float64":
        raise ValueError(f"explain: bits: expected 4 or 8 beside another dtype than float64, got {bits} and {dtype}")
    group = group or k
    if group > k or (k and k % group):
        raise ValueError(f"explain: group: expected a divisor of k = {k}, got {group}")
    groups = k // group if k else 0
    pairs = dtype == "bfloat16" and _host().cpu_isa() == "avx512bf16" and (bits == 4 or rows > 2)
    two = f", two inputs an operation{'' if bits == 4 else ' (int8)'}" if pairs else ""
    own = {
        "backend": "cpu",
        "isa": _host().cpu_isa(),
        "loop": f"streaming, {bits}-bit numbers in panels of 32 features, rows by 8, 4, 2 and 1{two}",
        "tasks": -(-n // 32),
        "rows": rows,
        "weight_bytes": n * groups * (-(-group // 8) * bits + 4) if k else 0,
        "flops": 2 * rows * n * k,
    }
    return "".join(f"{name}: {value}\n" for name, value in own.items()) + _REFUSED


def _decoder_layer(*, dtype: str, width: int, inner: int, batch: int = 1, q_len: int = 1, **attention: int) -> str:
    """Its parts, one after the other: their own lines, under their names."""
    heads, kv_heads, dim = (attention[name] for name in ("heads", "kv_heads", "head_dim"))
    rows = batch * q_len
    linear = {"qkv": ((heads + 2 * kv_heads) * dim, width), "o": (width, heads * dim),
              "gate_up": (2 * inner, width), "down": (width, inner)}  # fmt: skip
    parts = {name: _host().explain_linear(dtype=dtype, rows=rows, n=n, k=k) for name, (n, k) in linear.items()}
    parts["attention"] = _host().explain_attention(
        dtype=dtype, batch=batch, q_len=q_len, kv_len=attention["kv_len"], heads=heads, kv_heads=kv_heads,
        head_dim=dim, v_dim=dim, causal=True, window=attention.get("window", 0), num_sinks=0,
    )  # fmt: skip
    order = ("qkv", "attention", "o", "gate_up", "down")
    lines = [f"{part}.{line}" for part in order for line in parts[part].splitlines()]
    return "\n".join(["backend: cpu", f"isa: {_host().cpu_isa()}", *lines, _REFUSED])


def _decoder(*, dtype: str, layers: int, vocab: int, batch: int = 1, q_len: int = 1, **sizes: int) -> str:
    rows, width = batch * q_len, sizes["width"]
    way = "raw memory, one parallel region" if rows <= 16 or dtype == "float16" else "op by op"
    each = _decoder_layer(dtype=dtype, batch=batch, q_len=q_len, **sizes)
    head = _host().explain_linear(dtype=dtype, rows=rows, n=vocab, k=width)
    lines = [f"layers: {layers}, one after the other, {way}; what follows is of one", each]
    return "\n".join(lines + [f"lm_head.{line}" for line in head.splitlines()])


def _medusa_draft(*, dtype: str, heads: int, width: int, vocab: int, batch: int = 1, layers: int = 1) -> str:
    loop = f"heads side by side: {layers} layers, projection, root; the LM head over {heads * batch} rows; ranks"
    read = heads * (layers + 2) * width * width + vocab * width
    return _one_pass(dtype, loop, read, batch, _NO_GRADIENT, 8)


def _one_pass(
    dtype: str, loop: str, read: int, written: int, gradient: str = _REFUSED, written_item: int | None = None
) -> str:
    """Ops that read their inputs once and write their result once; counts are elements, ``written_item`` the bytes
    of a written one where it has another dtype."""
    item = _ITEM_BYTES[dtype]
    lines = (
        "backend: cpu",
        f"isa: {_host().cpu_isa()}",
        f"loop: {loop}",
        f"bytes_read: {read * item}",
        f"bytes_written: {written * (written_item or item)}",
        gradient,
    )
    return "\n".join(lines)


def _merge_states(*, dtype: str, parts: int, rows: int, head_dim: int) -> str:
    gradient = "gradient: torch's own operators, through out and lse"
    loop = f"one pass over {rows} rows, {parts} parts each"
    return _one_pass(dtype, loop, parts * rows * head_dim, rows * head_dim, gradient)


def _append_kv(*, dtype: str, kv_heads: int, head_dim: int, batch: int = 1, q_len: int = 1, v_dim: int = 0) -> str:
    elements = batch * q_len * kv_heads * (head_dim + (v_dim or head_dim))
    loop = f"one copy for each of {batch * q_len} tokens, in place"
    return _one_pass(dtype, loop, elements, elements, _NO_GRADIENT)


def _accumulate_mass(
    *, dtype: str, kv_len: int, heads: int, kv_heads: int, head_dim: int, batch: int = 1, q_len: int = 1
) -> str:
    text: str = _host().explain_attention(
        dtype=dtype, batch=batch, q_len=q_len, kv_len=kv_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        v_dim=head_dim, causal=False, window=0, num_sinks=0,
    )  # fmt: skip
    few = "loop: streaming" in text.splitlines()
    keys = 1024 if few else 512
    tasks = batch * kv_heads * -(-kv_len // keys)
    loop = f"{'streaming' if few else 'gemm'}; {tasks} tasks of {keys} keys, all rows of a KV head visit each"
    read = batch * head_dim * (kv_heads * kv_len + heads * q_len)
    lines = _one_pass(dtype, loop, read, batch * kv_heads * kv_len, _NO_GRADIENT, 8 if dtype == "float64" else 4)
    return f"{lines}\nflops: {2 * batch * heads * q_len * kv_len * head_dim}"


def _append_evicting(
    *, dtype: str, slots: int, kv_heads: int, head_dim: int, batch: int = 1, q_len: int = 1, v_dim: int = 0
) -> str:
    elements = batch * q_len * kv_heads * (head_dim + (v_dim or head_dim))
    loop = f"{batch * kv_heads} heads in parallel, {q_len} tokens one after the other, each over {slots} masses"
    return _one_pass(dtype, loop, elements, elements, _NO_GRADIENT)


def _merge_kv(
    *, dtype: str, slots: int, kept: int, kv_heads: int, head_dim: int, batch: int = 1, v_dim: int = 0
) -> str:
    heads, evicted, dims = batch * kv_heads, max(slots - kept, 0), head_dim + (v_dim or head_dim)
    loop = (
        f"{heads * -(-slots // 128)} tasks of 128 entries look for the nearest of {kept} keys, 64 at a time by GEMM; "
        f"then tasks of 16 columns sum what is merged and move {kept} rows of {heads} heads to the front"
    )
    lines = _one_pass(dtype, loop, heads * slots * dims, heads * min(kept, slots) * dims, _NO_GRADIENT)
    return f"{lines}\nflops: {2 * heads * evicted * kept * head_dim}"


def _append_labels(*, dtype: str, kv_heads: int, channels: int, bits: int = 0, batch: int = 1, q_len: int = 1) -> str:
    tokens = batch * q_len
    written = tokens * kv_heads * _label_bytes(channels, bits, dtype)
    loop = f"{channels} channels for each of {tokens} tokens, in place"
    return _one_pass(dtype, loop, tokens * kv_heads * channels, written, _NO_GRADIENT, 1)


def _label_bytes(channels: int, bits: int, dtype: str) -> int:
    return channels * min(4, _ITEM_BYTES[dtype]) if bits == 0 else -(-channels * bits // 32) * 4


def _label_topk(
    *, dtype: str, kv_len: int, heads: int, kv_heads: int, channels: int, selected: int, bits: int = 0, batch: int = 1,
    lists: int = 0,
) -> str:  # fmt: skip
    own = heads if lists == heads else kv_heads
    if bits == 0:
        scores = "float32 products"
    elif bits == 4 and channels <= 8:
        scores = "a word a token, scores of 16 bits"
    else:
        scores = f"{-(-channels * bits // 32)} words a token, scores of 32 bits"
    loop = f"{scores}; the last of {selected} by bisection on 16 bits; {batch * own} lists in parallel"
    read = batch * own * kv_len * _label_bytes(channels, bits, dtype)
    lines = ("backend: cpu", f"isa: {_host().cpu_isa()}", f"loop: {loop}", f"bytes_read: {read}",
             f"bytes_written: {batch * own * selected * 4}", _NO_GRADIENT)  # fmt: skip
    return "\n".join(lines)


def _append_page_bounds(*, dtype: str, kv_heads: int, head_dim: int, batch: int = 1, q_len: int = 1) -> str:
    elements = batch * q_len * kv_heads * head_dim
    loop = f"{batch * kv_heads} heads in parallel, {q_len} tokens one after the other, in place"
    return _one_pass(dtype, loop, elements, 2 * elements, _NO_GRADIENT)


def _page_topk(
    *, dtype: str, kv_len: int, heads: int, kv_heads: int, head_dim: int, pages: int, page: int = 16, batch: int = 1,
    lists: int = 0,
) -> str:  # fmt: skip
    if page == 0:
        raise ValueError("explain: page: expected 1 or more tokens, got 0")
    own, all_pages = heads if lists == heads else kv_heads, -(-kv_len // page)
    loop = f"float32 bounds of {all_pages} pages; the last of {pages} by bisection on 16 bits; {batch * own} lists"
    lines = ("backend: cpu", f"isa: {_host().cpu_isa()}", f"loop: {loop} in parallel",
             f"bytes_read: {batch * own * all_pages * 2 * head_dim * _ITEM_BYTES[dtype]}",
             f"bytes_written: {batch * own * pages * page * 4}", _NO_GRADIENT,
             f"flops: {4 * batch * heads * all_pages * head_dim}")  # fmt: skip
    return "\n".join(lines)


def _pim_gemv(
    *, dtype: str, n: int, k: int, rows: int = 1, batch: int = 1, units: int = 32, values: int = 512, lanes: int = 16,
    channels: int = 32,
) -> str:  # fmt: skip
    if not units * values * lanes * channels:
        raise ValueError("explain: units, values, lanes, channels: expected 1 or more, got 0")
    tiles, chunks = -(-n // units), -(-k // values)
    loop = f"{tiles} tiles of {units} banks in {channels} channels, one thread a channel; sums of {lanes} products"
    lines = ("backend: cpu", f"isa: {_host().cpu_isa()}", f"loop: {loop}, {chunks} results a row of the matrix",
             f"bytes_read: {batch * rows * (n * k + k) * _ITEM_BYTES[dtype]}",
             f"bytes_written: {batch * rows * n * chunks * 4}", _NO_GRADIENT,
             f"flops: {2 * batch * rows * n * k}")  # fmt: skip
    return "\n".join(lines)


def _rms_norm(*, dtype: str, dim: int, rows: int = 1) -> str:
    return _one_pass(dtype, f"two passes over each of {rows} rows", (rows + 1) * dim, rows * dim)


def _rotary(*, dtype: str, heads: int, head_dim: int, rows: int = 1) -> str:
    elements = rows * heads * head_dim
    return _one_pass(dtype, f"one pass over {rows * heads} rows of a token and a head", elements, elements)


def _rotary_append(*, dtype: str, heads: int, kv_heads: int, head_dim: int, rows: int = 1) -> str:
    elements = rows * (heads + 2 * kv_heads) * head_dim
    loop = f"one pass over each of {heads + 2 * kv_heads} heads a sequence, keys and values into the cache"
    return _one_pass(dtype, loop, elements, elements)


def _sampling(dtype: str, rows: int, vocab: int, written: int, written_item: int) -> str:
    loop = f"two passes over each of {rows} rows, more over the tokens that top-k, top-p or min-p can keep"
    gradient = "gradient: none, the op raises where an input requires grad"
    return _one_pass(dtype, loop, rows * vocab, written, gradient, written_item)


def _sample(*, dtype: str, vocab: int, rows: int = 1) -> str:
    return _sampling(dtype, rows, vocab, rows, 8)


def _sampling_probs(*, dtype: str, vocab: int, rows: int = 1) -> str:
    return _sampling(dtype, rows, vocab, rows * vocab, max(4, _ITEM_BYTES[dtype]))


def _silu_mul(*, dtype: str, dim: int, rows: int = 1) -> str:
    return _one_pass(dtype, f"one pass over {rows} rows", rows * dim, rows * (dim // 2))


_THROUGH_WEIGHTS = "gradient: torch's own operators, through the weights"
_BY_ROWS = "by the rows that a group has: inner products with the weights as they lie for few, panels of 32 for many"


def _topk_routing(*, dtype: str, experts: int, k: int, rows: int = 1) -> str:
    loop = f"a token a lane: {experts} scores, each inserted into the {k} best"
    written = rows * k * (4 + max(4, _ITEM_BYTES[dtype]))
    return _one_pass(dtype, loop, rows * experts, written, _THROUGH_WEIGHTS, 1)


def _moe_sort(*, dtype: str, experts: int, k: int, rows: int = 1) -> str:
    return _one_walk("a counting sort, two passes over the slots", 1, rows * k * 4, 4 * (2 * rows * k + experts))


def _moe_permute(*, dtype: str, experts: int, k: int, dim: int, rows: int = 1) -> str:
    loop = f"a counting sort of {rows * k} slots of {experts} experts, then a copy a slot"
    return _one_pass(dtype, loop, rows * k * dim, rows * k * dim, "gradient: moe_unpermute")


def _moe_unpermute(*, dtype: str, k: int, dim: int, rows: int = 1) -> str:
    loop = f"one pass over {rows} tokens, {k} rows each"
    return _one_pass(dtype, loop, rows * k * dim, rows * dim, "gradient: torch's own operators, in y and weights")


def _grouped_mm(*, dtype: str, groups: int, n: int, k: int, rows: int = 1) -> str:
    gradient = "gradient: grouped_mm and grouped_mm_weight_gradient"
    text = _one_pass(dtype, _BY_ROWS, rows * k + groups * k * n, rows * n, gradient)
    return f"{text}\nflops: {2 * rows * n * k}"


def _weight_gradient(*, dtype: str, groups: int, n: int, k: int, rows: int = 1) -> str:
    loop = "group by group: panels of 32 columns of dy, inputs as rows"
    return f"{_one_pass(dtype, loop, rows * (k + n), groups * k * n, _NO_GRADIENT)}\nflops: {2 * rows * n * k}"


def _fused_experts(*, dtype: str, experts: int, k: int, width: int, inner: int, rows: int = 1) -> str:
    chosen = min(experts, rows * k)
    read = rows * width + chosen * 3 * inner * width
    gradient = "gradient: a composition of moe_permute, grouped_mm, torch's activation and moe_unpermute"
    text = _one_pass(dtype, f"two products, {_BY_ROWS}", read, rows * width, gradient)
    return f"{text}\nflops: {6 * rows * k * inner * width}\nexperts_read: {chosen} at most"


def _one_walk(loop: str, batch: int, read: int, written: int) -> str:
    """Ops on trees: the same code on every instruction set; bytes of a sequence."""
    lines = (
        "backend: cpu",
        "isa: the same code on every one",
        f"loop: {loop}",
        f"bytes_read: {batch * read}",
        f"bytes_written: {batch * written}",
        "gradient: none, the op raises where an input requires grad",
    )
    return "\n".join(lines)


def _pack_ancestors(*, dtype: str, nodes: int, batch: int = 1) -> str:
    return _one_walk("one pass over the nodes", batch, nodes * 4, nodes * (4 + 8 * ((nodes + 63) // 64)))


def _verify_greedy(*, dtype: str, nodes: int, batch: int = 1) -> str:
    return _one_walk("one pass over the nodes", batch, nodes * 20, nodes * 4 + 12)


def _verify_rejection(*, dtype: str, nodes: int, vocab: int, batch: int = 1) -> str:
    loop = "one pass over the nodes, sequences in parallel; laws of tried nodes alone are read, all of them at most"
    return _one_walk(loop, batch, nodes * (20 + 8 * vocab), nodes * 4 + 12)


def _verify_typical(*, dtype: str, nodes: int, vocab: int, batch: int = 1) -> str:
    loop = "one pass over the nodes, sequences in parallel; laws of accepted nodes alone are read, all of them at most"
    return _one_walk(loop, batch, nodes * (12 + 4 * vocab), nodes * 4 + 12)


_EXPLAINED: dict[str, Callable[..., str]] = {
    "attention": _attention,
    "varlen_attention": _attention,
    "decoder": _decoder,
    "decoder_layer": _decoder_layer,
    "medusa_draft": _medusa_draft,
    "merge_states": _merge_states,
    "accumulate_mass": _accumulate_mass,
    "append_evicting": _append_evicting,
    "merge_kv": _merge_kv,
    "append_kv": _append_kv,
    "append_labels": _append_labels,
    "append_page_bounds": _append_page_bounds,
    "commit_kv": _append_kv,
    "paged_attention": _paged_attention,
    "cascade_attention": _cascade_attention,
    "sparse_attention": _sparse_attention,
    "tree_attention": _tree_attention,
    "label_topk": _label_topk,
    "page_topk": _page_topk,
    "packed_linear": _packed_linear,
    "pim_gemv": _pim_gemv,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "rotary_append": _rotary_append,
    "sample": _sample,
    "sampling_probs": _sampling_probs,
    "silu_mul": _silu_mul,
    "topk_routing": _topk_routing,
    "moe_sort": _moe_sort,
    "moe_permute": _moe_permute,
    "moe_unpermute": _moe_unpermute,
    "grouped_mm": _grouped_mm,
    "grouped_mm_weight_gradient": _weight_gradient,
    "fused_experts": _fused_experts,
    "pack_ancestors": _pack_ancestors,
    "verify_greedy": _verify_greedy,
    "verify_rejection": _verify_rejection,
    "verify_typical": _verify_typical,
}
