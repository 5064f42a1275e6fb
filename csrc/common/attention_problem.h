// What an attention call asks for, free of torch and of any device. Strides are in elements.
// Row and key positions follow the public convention: query i of a sequence stands at
// kv_len - T + i, and window, sinks and prefix count from kv_start.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/views.h"

namespace effops {

struct AttentionProblem {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, v_dim = 0;
  int64_t q_len = 0, kv_capacity = 0;  // dense only

  TensorView4 q, k, v, out;
  RowView lse;

  const int32_t* cu_q = nullptr;  // ragged queries and keys: offsets, batch + 1 each
  const int32_t* cu_k = nullptr;
  const int32_t* kv_lens = nullptr;
  const int32_t* kv_starts = nullptr;
  const int32_t* prefix_lens = nullptr;
  const int32_t* head_windows = nullptr;
  const float* sink_logits = nullptr;

  double scale = 1.0, softcap = 0.0;
  int64_t window = 0, num_sinks = 0;
  bool causal = false;

  int64_t group() const { return heads / kv_heads; }
};

struct AttentionGradients {
  TensorView4 d_out, dq, dk, dv;  // dk and dv zero where no key is valid
  RowView d_lse;                  // data null: no gradient arrives through lse
  char* dsink = nullptr;          // [batch, heads] in the compute type; null without sink logits
};

// One sequence of the batch, with the masks' origin resolved.
struct Sequence {
  int64_t q_begin = 0, q_len = 0;  // q_begin: first token of a ragged batch
  int64_t k_begin = 0, kv_len = 0, kv_start = 0, prefix_end = 0, sinks_end = 0;

  int64_t position(int64_t i) const { return kv_len - q_len + i; }
};

inline Sequence sequence_of(const AttentionProblem& p, int64_t b) {
  Sequence s;
  if (p.cu_q) {
    s.q_begin = p.cu_q[b];
    s.q_len = p.cu_q[b + 1] - p.cu_q[b];
    s.k_begin = p.cu_k[b];
    s.kv_len = p.cu_k[b + 1] - p.cu_k[b];
  } else {
    s.q_len = p.q_len;
    s.kv_len = p.kv_lens ? p.kv_lens[b] : p.kv_capacity;
  }
  s.kv_start = p.kv_starts ? std::min<int64_t>(p.kv_starts[b], s.kv_len) : 0;
  s.prefix_end = p.prefix_lens ? s.kv_start + p.prefix_lens[b] : s.kv_start;
  s.sinks_end = s.kv_start + p.num_sinks;
  return s;
}

// The keys that the query at position p may see:
// j in [start, len) and (not causal or j <= p or j < prefix_end) and (no window or j > p - window or j < sinks_end).
struct Visibility {
  int64_t start, len, window, sinks_end, prefix_end;
  bool causal;

  bool allowed(int64_t position, int64_t j) const {
    return j >= start && j < len && (!causal || j <= position || j < prefix_end) &&
           (window == 0 || j > position - window || j < sinks_end);
  }
  // One past the last key any clause allows at this position.
  int64_t end_at(int64_t position) const {
    return causal ? std::clamp(std::max(position + 1, prefix_end), start, len) : len;
  }
  // First key of the windowed part.
  int64_t begin_at(int64_t position) const { return window == 0 ? start : std::max(start, position - window + 1); }
};

inline Visibility visibility_of(const AttentionProblem& p, const Sequence& s, int64_t kv_head) {
  const int64_t window = p.head_windows ? p.head_windows[kv_head] : p.window;
  return {s.kv_start, s.kv_len, window, s.sinks_end, s.prefix_end, p.causal};
}

}  // namespace effops
