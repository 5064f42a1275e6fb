"""The bugs that tools/mutants.py plants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``notices`` says what kind of input shows it."""

    name: str
    file: str
    old: str
    new: str
    notices: str


PROBLEM, PLAN, PLAN_CPP = (f"csrc/common/attention_{f}" for f in ("problem.h", "plan.h", "plan.cpp"))
ROWS, STREAM, BLOCK, BACKWARD = (f"csrc/cpu/attention/{f}.h" for f in ("rows", "stream", "block", "backward"))
TREE, VERIFY = (f"csrc/common/{f}.cpp" for f in ("tree", "verify"))
LAYER, LINEAR, DOT_ROWS = "csrc/cpu/layer/layer.h", "csrc/cpu/gemv/linear.h", "csrc/cpu/gemv/dot_rows.h"

MUTANTS = (
    Mutant(
        "tail-tile-dropped",
        PLAN,
        "return (end - begin + kTileKeys - 1) / kTileKeys;",
        "return (end - begin) / kTileKeys;",
        "a length that is no multiple of the tile",
    ),
    Mutant(
        "stale-length",
        PROBLEM,
        "s.kv_len = p.kv_lens ? p.kv_lens[b] : p.kv_capacity;",
        "s.kv_len = p.kv_capacity;",
        "kv_lens below the capacity",
    ),
    Mutant(
        "swapped-strides",
        "csrc/ops/attention_options.cpp",
        "{data, a.stride(0), a.stride(1), a.stride(2), a.stride(3)}",
        "{data, a.stride(0), a.stride(2), a.stride(1), a.stride(3)}",
        "more than one token and head",
    ),
    Mutant(
        "last-stride-ignored",
        DOT_ROWS,
        "P::element(from[(at + i) * stride]);",
        "P::element(from[at + i + 0 * stride]);",
        "few query rows whose last dimension is not contiguous",
    ),
    Mutant(
        "kv-starts-ignored",
        PROBLEM,
        "s.kv_start = p.kv_starts ? std::min<int64_t>(p.kv_starts[b], s.kv_len) : 0;",
        "s.kv_start = 0;",
        "left padding",
    ),
    Mutant(
        "ragged-key-offset",
        PROBLEM,
        "s.k_begin = p.cu_k[b];",
        "s.k_begin = p.cu_q[b];",
        "ragged batches with different numbers of queries and keys",
    ),
    Mutant(
        "window-off-by-one",
        PROBLEM,
        "std::max(start, position - window + 1)",
        "std::max(start, position - window)",
        "a window shorter than the keys",
    ),
    Mutant(
        "causal-off-by-one",
        PROBLEM,
        "std::max(position + 1, prefix_end)",
        "std::max(position, prefix_end)",
        "causal attention",
    ),
    Mutant(
        "sinks-from-zero",
        PROBLEM,
        "s.sinks_end = s.kv_start + p.num_sinks;",
        "s.sinks_end = p.num_sinks;",
        "num_sinks and window with kv_starts",
    ),
    Mutant(
        "prefix-from-zero",
        PROBLEM,
        "p.prefix_lens ? s.kv_start + p.prefix_lens[b] : s.kv_start",
        "p.prefix_lens ? p.prefix_lens[b] : s.kv_start",
        "prefix_lens with kv_starts",
    ),
    Mutant(
        "head-windows-ignored",
        PROBLEM,
        "p.head_windows ? p.head_windows[kv_head] : p.window",
        "p.window",
        "head_windows shorter than the keys",
    ),
    Mutant(
        "gqa-interleaved",
        ROWS,
        "return kv_head * group + row % group;",
        "return row % group * p.kv_heads + kv_head;",
        "groups and KV heads both above one",
    ),
    Mutant(
        "stream-rescale-missing",
        STREAM,
        " * V::set1(alpha[m]);",
        ";",
        "a later tile with a larger score, few rows",
    ),
    Mutant(
        "block-rescale-missing",
        BLOCK,
        "l = l * shrink + reduce_add(sum);",
        "l = l + reduce_add(sum);",
        "a later tile with a larger score, many rows",
    ),
    Mutant(
        "last-split-dropped",
        PLAN_CPP,
        "tiles <= split ? 1 : (tiles + split - 1) / split;",
        "tiles <= split ? 1 : tiles / split;",
        "more than 1024 keys for few rows, no multiple of 1024",
    ),
    Mutant(
        "join-without-rescale",
        ROWS,
        "const C weight = std::exp(part[p.v_dim] - m);",
        "const C weight = 1;",
        "splits with different maxima",
    ),
    Mutant(
        "empty-row",
        ROWS,
        "C factor = l == 0 ? C(0) : C(1) / l;",
        "C factor = C(1) / l;",
        "a row without any key",
    ),
    Mutant(
        "softcap-before-scale",
        ROWS,
        "(cap * tanh(V::load(s + i))).store(s + i);",
        "(cap * V::set1(p.scale) * tanh(V::load(s + i) * V::set1(1 / p.scale))).store(s + i);",
        "softcap with scores near the cap",
    ),
    Mutant(
        "sink-not-in-lse",
        ROWS,
        "lse = top + std::log(total);",
        "",
        "lse with sink_logits",
    ),
    Mutant(
        "backward-without-d-lse",
        BACKWARD,
        "C delta = g_.d_lse.data ? -*rows_.lse_at(g_.d_lse, r) : C(0);",
        "C delta = 0;",
        "a gradient through lse",
    ),
    Mutant(
        "backward-without-softcap-slope",
        BACKWARD,
        "cap == 0 ? scale : scale * (1 - (s[j] / cap) * (s[j] / cap));",
        "scale + 0 * cap;",
        "a gradient with softcap",
    ),
    Mutant(
        "backward-sink-sign",
        BACKWARD,
        "d_sink[rows_.head(r)] -= std::exp(sink - lse) * delta_[r];",
        "d_sink[rows_.head(r)] += std::exp(sink - lse) * delta_[r];",
        "a gradient of sink_logits",
    ),
    Mutant(
        "merge-without-maximum",
        LAYER,
        "total += std::exp(lses[i * p.rows + row] - top);\n"
        "    const C lse = top > kEmpty ? top + std::log(total) : kEmpty;",
        "total += std::exp(lses[i * p.rows + row]);\n    const C lse = top > kEmpty ? std::log(total) : kEmpty;",
        "merge_states with lse beyond 100",
    ),
    Mutant(
        "merge-lse-is-maximum",
        LAYER,
        "top > kEmpty ? top + std::log(total) : kEmpty;",
        "top;",
        "merge_states of two parts",
    ),
    Mutant(
        "gemv-tail-dropped",
        DOT_ROWS,
        "if (at < dim)",
        "if (at == 0 && at < dim)",
        "an inner size that is no multiple of a vector",
    ),
    Mutant(
        "gemv-bias-lost",
        LINEAR,
        "if (bias != nullptr) v +=",
        "if (bias != nullptr && row == 0) v +=",
        "bias with more than one row",
    ),
    Mutant(
        "gemv-residual-lost",
        LINEAR,
        "if (residual != nullptr) v +=",
        "if (residual != nullptr && row == 0) v +=",
        "residual with more than one row",
    ),
    Mutant(
        "rms-eps-outside-root",
        LAYER,
        "std::sqrt(reduce_add(sum) / C(dim) + C(eps))",
        "(std::sqrt(reduce_add(sum) / C(dim)) + C(eps))",
        "an eps that is not small beside the mean square",
    ),
    Mutant(
        "rotary-sine-sign",
        LAYER,
        "store_n(b * c + a * s,",
        "store_n(b * c - a * s,",
        "rotary at a position above 0",
    ),
    Mutant(
        "rotary-position-off-by-one",
        LAYER,
        "p.angles.cos + at, p.angles.sin + at,\n               p.angles.half, p.dim, reinterpret_cast<T*>(p.y)",
        "p.angles.cos + std::max<int64_t>(at - p.angles.half, 0), p.angles.sin + at,\n"
        "               p.angles.half, p.dim, reinterpret_cast<T*>(p.y)",
        "rotary at a position above 0",
    ),
    Mutant(
        "silu-operands-swapped",
        LAYER,
        "const V g = load_some<V>(gate + d, n);\n    store_n(g * sigmoid(g) * load_some<V>(up + d, n)",
        "const V g = load_some<V>(up + d, n);\n    store_n(g * sigmoid(g) * load_some<V>(gate + d, n)",
        "silu_mul",
    ),
    Mutant(
        "append-does-not-skip",
        "csrc/common/append.cpp",
        "const int64_t slot = p.slots.of(b, t);\n      if (slot < 0) continue;",
        "const int64_t given = p.slots.of(b, t), slot = given < 0 ? 0 : given;",
        "append_kv with slot -1 into a cache whose other slots are checked",
    ),
    Mutant(
        "rotary-append-skips-the-query",
        LAYER,
        "if (kv < 0) {",
        "if (slot < 0) continue;\n      if (kv < 0) {",
        "rotary_append with slot -1, the query of that token read",
    ),
    Mutant(
        "rotary-append-turns-values",
        LAYER,
        "const bool value = kv >= p.kv_heads;",
        "const bool value = kv > p.kv_heads;",
        "rotary_append",
    ),
    Mutant(
        "linear-norm-of-the-first-row",
        LINEAR,
        "prepared(p, std::min(first + m, p.rows - 1), row)",
        "prepared(p, p.norm != nullptr ? first : std::min(first + m, p.rows - 1), row)",
        "packed_linear with a norm and more than one row",
    ),
    Mutant(
        "stream-masks-four-of-eight-rows",
        STREAM,
        "for (int m = 0; m < MR; ++m) {\n        const int64_t row",
        "for (int m = 0; m < std::min(MR, 4); ++m) {\n        const int64_t row",
        "attention with a mask and eight rows a KV head",
    ),
    Mutant(
        "layer-forgets-its-window",
        "csrc/ops/decoder_layer.cpp",
        "p.window = window;",
        "p.window = tokens > 1 ? window : 0;",
        "decoder_layer with a window and one new token",
    ),
    Mutant(
        "ancestors-word-of-bit-64",
        TREE,
        "row[i >> 6] |=",
        "row[(i - 1) >> 6 > 0 ? (i - 1) >> 6 : 0] |=",
        "a tree of more than 64 nodes",
    ),
    Mutant(
        "padding-is-a-child",
        VERIFY,
        "int64_t parent(int64_t i) const { return p.parents.of(b, i); }",
        "int64_t parent(int64_t i) const { return i > 0 && p.parents.of(b, i) == kTreePadding && "
        "p.parents.of(b, 0) != kTreePadding ? 0 : p.parents.of(b, i); }",
        "padding with a token that the target says",
    ),
    Mutant(
        "child-matched-with-its-own-target",
        VERIFY,
        "s.token(i) == p.target_tokens.at(b, at)",
        "s.token(i) == p.target_tokens.at(b, i)",
        "verify_greedy",
    ),
    Mutant(
        "bonus-of-the-root",
        VERIFY,
        "p.next_token[b] = p.target_tokens.at(b, at);",
        "p.next_token[b] = p.target_tokens.at(b, 0);",
        "verify_greedy that accepts a draft",
    ),
    Mutant(
        "residual-kept-for-the-next-level",
        VERIFY,
        "left = target_law(s, at, left.weight);",
        "if (p.uniforms.data == nullptr) left = target_law(s, at, left.weight);",
        "verify_rejection that accepts a drawn child",
    ),
    Mutant(
        "sibling-tested-with-the-old-law",
        VERIFY,
        "if (p.uniforms.at(s.b, i) * draft.of(token) < left.of(token)) {",
        "if (p.uniforms.at(s.b, i) * draft.of(token) * target_law(s, at, spare).total < spare[token]) {",
        "a second sibling, the first one rejected",
    ),
    Mutant(
        "repeated-sibling-dropped",
        VERIFY,
        "if (draft.weight[token] == 0) continue;",
        "if (draft.weight[token] == 0 || (i > 1 && s.parent(i - 1) == at && s.token(i - 1) == token)) continue;",
        "siblings drawn with replacement that repeat",
    ),
    Mutant(
        "draft-law-not-renormalised",
        VERIFY,
        "draft.total = sum(p.vocab, [&](int64_t v) { return draft.weight[v]; });",
        "",
        "a third sibling without replacement",
    ),
    Mutant(
        "final-draw-from-the-last-test",
        VERIFY,
        "draw(left, p.vocab, p.uniforms.at(s.b, p.tokens));",
        "draw(left, p.vocab, p.uniforms.at(s.b, at));",
        "the final draw of verify_rejection",
    ),
    Mutant(
        "typical-threshold-not-strict",
        VERIFY,
        "if (!(chance > from.threshold)) continue;",
        "if (!(chance >= from.threshold)) continue;",
        "a probability equal to epsilon",
    ),
    Mutant(
        "typical-shortest-tie",
        VERIFY,
        "nodes[i].length == nodes[best].length && nodes[i].score > nodes[best].score",
        "nodes[i].length == nodes[best].length && nodes[i].score >= nodes[best].score",
        "two children that carry the same token",
    ),
)
