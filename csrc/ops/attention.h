// Checks and problem descriptors shared by the attention ops of all backends.
#pragma once

#include "common/attention_problem.h"
#include "ops/layer.h"

namespace effops::ops {

// The options every attention op takes, resolved. Owns copies of strided index arguments.
struct AttentionOptions {
  AttentionOptions(const char* op, const Arg& q, int64_t batch, int64_t heads, int64_t kv_heads,
                   const OptionalTensor& kv_lens, const OptionalTensor& kv_starts, bool causal, int64_t window,
                   int64_t num_sinks, const OptionalTensor& prefix_lens, const OptionalTensor& head_windows,
                   const OptionalTensor& sink_logits, double softcap, std::optional<double> scale);

  void apply(AttentionProblem& p) const;

  Values<int32_t> kv_lens, kv_starts, prefix_lens, head_windows;
  Values<float> sink_logits;
  bool causal;
  int64_t window, num_sinks;
  double softcap, scale;
};

TensorView4 view4(const Arg& a, char* data);  // [B, T, H, D]
TensorView4 view3(const Arg& a, char* data);  // [N, H, D]
RowView rows3(const Arg& a, char* data);      // [B, T, H]
RowView rows2(const Arg& a, char* data);      // [N, H]

}  // namespace effops::ops
