// What an attention call asks for, free of torch and of any device. Strides are in elements.
// Row and key positions follow the public convention: query i of a sequence stands at
// kv_len - T + i, and window, sinks and prefix count from kv_start.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/views.h"

namespace effops {

// The mask of the last T keys, which are the queries' own: query i sees key j of them if bit j is set
// (word j >> 6, bit j & 63), and stands `depths[i]` positions after the committed keys.
struct Tree {
  const uint64_t* ancestors = nullptr;  // [batch or 1, tokens, words]; null: no tree
  const int32_t* depths = nullptr;      // [batch or 1, tokens]; on a device null: a row's bits, less one
  int64_t tokens = 0, words = 0, ancestors_batch = 0, depths_batch = 0;
};

struct AttentionProblem {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, v_dim = 0;
  int64_t q_len = 0, kv_capacity = 0;  // of every sequence, where there are no offsets

  TensorView4 q, k, v, out;
  RowView lse;

  const int32_t* cu_q = nullptr;  // ragged queries and keys: offsets, batch + 1 each
  const int32_t* cu_k = nullptr;
  const int32_t* kv_lens = nullptr;  // [batch], or [batch, kv_heads] with lens_a_head
  bool lens_a_head = false;
  PageTable pages;       // of k and v; their views are then [pages, page tokens, kv_heads, dim]
  Tree tree;             // of the last q_len keys
  Selection selected;    // key j of a KV head is the token that entry j names; without other masks, for one query token
  int64_t kv_share = 1;  // KV heads of the problem that read the same head of k and v
  const int32_t* kv_starts = nullptr;
  const int32_t* prefix_lens = nullptr;
  const int32_t* head_windows = nullptr;
  const float* sink_logits = nullptr;

  double scale = 1.0, softcap = 0.0;
  int64_t window = 0, num_sinks = 0;
  bool causal = false;
  bool wide_out = false;  // out is of the compute type: a part of a result, to be merged

  EFFOPS_HD int64_t group() const { return heads / kv_heads; }
};

struct AttentionGradients {
  TensorView4 d_out, dq, dk, dv;  // dk and dv zero where no key is valid
  RowView d_lse;                  // data null: no gradient arrives through lse
  char* dsink = nullptr;          // [batch, heads] in the compute type; null without sink logits
};

struct Positions {
  int64_t lowest, highest;
};

// One sequence of the batch, with the masks' origin resolved.
struct Sequence {
  int64_t q_begin = 0, q_len = 0;  // q_begin: first token of a ragged batch
  int64_t k_begin = 0, kv_len = 0, kv_start = 0, prefix_end = 0, sinks_end = 0;
  const uint64_t* ancestors = nullptr;  // [q_len, words]; null: no tree
  const int32_t* depths = nullptr;
  int64_t words = 0;

  // The first key that only tree bits show.
  EFFOPS_HD int64_t tree_begin() const { return kv_len - q_len; }
  EFFOPS_HD int64_t position(int64_t i) const { return kv_len - q_len + (depths ? depths[i] : i); }
  // Of queries [first, last].
  EFFOPS_HD Positions positions(int64_t first, int64_t last) const {
    if (!depths) return {position(first), position(last)};
    int32_t low = depths[first], high = low;
    for (int64_t i = first + 1; i <= last; ++i) {
      low = min_of(low, depths[i]);
      high = max_of(high, depths[i]);
    }
    return {kv_len - q_len + low, kv_len - q_len + high};
  }
};

// What KV head g sees of sequence b.
EFFOPS_HD inline Sequence sequence_of(const AttentionProblem& p, int64_t b, int64_t g = 0) {
  Sequence s;
  s.q_begin = p.cu_q ? p.cu_q[b] : 0;
  s.q_len = p.cu_q ? p.cu_q[b + 1] - p.cu_q[b] : p.q_len;
  if (p.cu_k) {
    s.k_begin = p.cu_k[b];
    s.kv_len = p.cu_k[b + 1] - p.cu_k[b];
  } else {
    s.kv_len = p.kv_lens ? p.kv_lens[p.lens_a_head ? b * p.kv_heads + g : b] : p.kv_capacity;
  }
  if (p.selected.given()) {
    s.kv_len = p.selected.count_of(b, g);
    return s;
  }
  if (p.tree.ancestors) {
    s.ancestors = p.tree.ancestors + b * p.tree.ancestors_batch;
    s.depths = p.tree.depths + b * p.tree.depths_batch;
    s.words = p.tree.words;
  }
  s.kv_start = p.kv_starts ? min_of<int64_t>(p.kv_starts[b], s.kv_len) : 0;
  s.prefix_end = p.prefix_lens ? s.kv_start + p.prefix_lens[b] : s.kv_start;
  s.sinks_end = s.kv_start + p.num_sinks;
  return s;
}

// The keys that the query at position p may see:
// j in [start, len) and (not causal or j <= p or j < prefix_end) and (no window or j > p - window or j < sinks_end).
// Keys from tree_begin on are the tree's; there the rule is that of tree_allows.
struct Visibility {
  int64_t start, len, window, sinks_end, prefix_end, tree_begin;
  bool causal;

  EFFOPS_HD bool allowed(int64_t position, int64_t j) const {
    return j >= start && j < len && (!causal || j <= position || j < prefix_end) &&
           (window == 0 || j > position - window || j < sinks_end);
  }
  // One past the last key any clause allows at this position.
  EFFOPS_HD int64_t end_at(int64_t position) const {
    return causal ? clamp_to(max_of(position + 1, prefix_end), start, len) : len;
  }
  // First key of the windowed part; every key of the tree is in it.
  EFFOPS_HD int64_t begin_at(int64_t position) const {
    return window == 0 ? start : clamp_to(position - window + 1, start, max_of(start, tree_begin));
  }
};

EFFOPS_HD inline Visibility visibility_of(const AttentionProblem& p, const Sequence& s, int64_t kv_head) {
  const int64_t window = p.head_windows ? p.head_windows[kv_head] : p.window;
  const int64_t tree_begin = s.ancestors ? s.tree_begin() : s.kv_len;
  return {s.kv_start, s.kv_len, window, s.sinks_end, s.prefix_end, tree_begin, p.causal};
}

// Whether query i sees the tree's key t. The window counts from the key's position, not its slot.
EFFOPS_HD inline bool tree_allows(const Visibility& see, const Sequence& s, int64_t i, int64_t t) {
  if (!(s.ancestors[i * s.words + (t >> 6)] >> (t & 63) & 1)) return false;
  return see.window == 0 || s.position(t) > s.position(i) - see.window || s.position(t) < see.sinks_end;
}

}  // namespace effops
