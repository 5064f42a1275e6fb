#include "attention/backward_launch.h"

#include <algorithm>

#include "attention/backward.h"
#include "attention/backward_rows.h"
#include "attention/launch.h"

namespace effops::device {
namespace {

int64_t rows_of(const AttentionProblem& p, const AttentionLimits& limits) {
  return (p.cu_q ? limits.q_rows : p.batch * p.q_len) * p.heads;
}

template <class T>
BackwardParams params_of(const AttentionProblem& p, const AttentionGradients& g, const AttentionLimits& limits,
                         void* workspace) {
  constexpr int kBlock = sizeof(T) == 4 ? kStreamRows : kBlockRows;  // rows or keys that a thread block owns
  BackwardParams b;
  b.g = g;
  b.scale = static_cast<float>(p.scale);
  b.aligned_d_out = aligned_rows<T>(g.d_out, p.cu_q);
  b.stats = {static_cast<char*>(workspace), p.q_len * p.heads, p.heads, 1};
  b.key_blocks = static_cast<int>((limits.max_kv_len + kBlock - 1) / kBlock);
  b.a = shared_params<T>(p, limits);
  if (!p.cu_q) b.a.row_blocks = static_cast<int>((p.q_len * p.group() + kBlock - 1) / kBlock);
  return b;
}

template <class T>
int run(const BackwardParams& b, void* stream) {
  const AttentionProblem& p = b.a.p;
  const int64_t blocks = std::min<int64_t>((rows_of(p, b.a.limits) + kStatsWarps - 1) / kStatsWarps, 4096);
  if (const int status = launch<BackwardParams>(
          {"backward_rows", dim3(static_cast<unsigned>(blocks)), kStatsWarps * kWarp, 0, stream}, &backward_rows<T>, b))
    return status;
  if (b.g.dsink) {
    const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.heads));
    if (const int status = launch<BackwardParams>({"backward_sinks", grid, kSinkThreads, kWarp * sizeof(float), stream},
                                                  &backward_sinks, b))
      return status;
  }
  if (const int status = launch_backward_keys<T>(b, stream)) return status;
  return launch_backward_queries<T>(b, stream);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionProblem& p, const AttentionLimits& limits) {
  return rows_of(p, limits) * static_cast<int64_t>(sizeof(RowStats));
}

int attention_backward(const AttentionProblem& p, const AttentionGradients& g, const AttentionLimits& limits,
                       void* workspace, void* stream) {
  if (p.head_dim > kLargestHead || p.v_dim > kLargestHead || p.dtype == DType::f64 || p.pages.given() ||
      p.tree.ancestors)
    return kUnsupported;
  if (p.batch == 0 || rows_of(p, limits) == 0) return 0;
  switch (p.dtype) {
    case DType::bf16:
      return run<bf16>(params_of<bf16>(p, g, limits, workspace), stream);
    case DType::f16:
      return run<f16>(params_of<f16>(p, g, limits, workspace), stream);
    default:
      return run<float>(params_of<float>(p, g, limits, workspace), stream);
  }
}

}  // namespace effops::device
