// Before the products: what each row needs of the forward pass, and the gradient of the sink logits, which needs no
// more than that.
#pragma once

#include "attention/backward_params.h"
#include "attention/row_block.h"
#include "primitives/convert.h"
#include "primitives/math.h"

namespace effops::device {

inline constexpr int kStatsWarps = 4, kSinkThreads = 128;

// One warp a (token, head), grid-stride; tokens of no sequence too. delta = <d_out, out> - d_lse.
template <class T>
__global__ void backward_rows(const __grid_constant__ BackwardParams p) {
  const AttentionProblem& a = p.a.p;
  const int64_t tokens = a.cu_q ? p.a.limits.q_rows : a.q_len;  // of a batch entry
  const int64_t count = (a.cu_q ? 1 : a.batch) * tokens * a.heads, stride = int64_t(gridDim.x) * kStatsWarps;
  for (int64_t i = int64_t(blockIdx.x) * kStatsWarps + warp_index(); i < count; i += stride) {
    const int64_t h = i % a.heads, t = i / a.heads % tokens, b = i / a.heads / tokens;
    auto at = [&](const auto& x) { return b * x.batch + t * x.token + h * x.head; };
    const T* out = reinterpret_cast<const T*>(a.out.data) + at(a.out);
    const T* d_out = reinterpret_cast<const T*>(p.g.d_out.data) + at(p.g.d_out);
    float delta = 0;
    for (int64_t d = lane_index(); d < a.v_dim; d += kWarp)
      delta = fmaf(widen(d_out[d * p.g.d_out.dim]), widen(out[d * a.out.dim]), delta);
    delta = reduce_lanes<kWarp>(delta, Sum());
    if (lane_index() != 0) continue;
    const float lse = reinterpret_cast<const float*>(a.lse.data)[at(a.lse)];
    RowStats row;
    if (lse != -INFINITY) {
      if (p.g.d_lse.data) delta -= reinterpret_cast<const float*>(p.g.d_lse.data)[at(p.g.d_lse)];
      row = {lse * kLog2e, delta};
    }
    reinterpret_cast<RowStats*>(p.stats.data)[at(p.stats)] = row;
  }
}

// One block a (sequence, head): minus the sum of the sink's weight times delta over the sequence's rows.
static __global__ void __launch_bounds__(kSinkThreads) backward_sinks(const __grid_constant__ BackwardParams p) {
  const int64_t b = blockIdx.x, h = blockIdx.y;
  const Sequence s = checked_sequence(p.a, b, p.a.group.quotient(h));
  const RowStats* stats = reinterpret_cast<const RowStats*>(p.stats.data) + h * p.stats.head +
                          (p.a.p.cu_q ? s.q_begin * p.stats.token : b * p.stats.batch);
  const float sink = p.a.p.sink_logits[h] * kLog2e;
  float sum = 0;
  for (int64_t t = threadIdx.x; t < s.q_len; t += kSinkThreads) {
    const RowStats row = stats[t * p.stats.token];
    sum += exp2_approx(sink - row.lse2) * row.delta;
  }
  sum = reduce_block(sum, Sum(), 0.0f, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) reinterpret_cast<float*>(p.g.dsink)[b * p.a.p.heads + h] = -sum;
}

}  // namespace effops::device
