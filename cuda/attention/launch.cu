#include "attention/launch.h"

#include <cmath>

#include "attention/splits.h"

namespace effops::device {
namespace {

constexpr int64_t kAlignment = 256;  // of the parts of the workspace

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Workspace {
  int64_t depths = 0, partial_out = 0, partial_row = 0;  // bytes

  int64_t bytes() const { return depths + partial_out + 2 * partial_row; }
};

bool counts_depths(const AttentionProblem& p) {
  return p.tree.ancestors && !p.tree.depths && (p.window || p.head_windows);
}

// Fills in the schedule; the sizes of the workspace.
Workspace schedule(AttentionParams& a) {
  const AttentionProblem& p = a.p;
  const AttentionPlan plan = plan_attention(p, a.limits);
  a.row_blocks = plan.row_blocks;
  a.splits = plan.splits;
  a.slots = plan.slots;
  Workspace w;
  const int64_t count = p.batch * p.kv_heads * plan.slots;
  w.partial_out = aligned(count * p.v_dim * 4);
  w.partial_row = aligned(count * 4);
  if (plan.rows > 0 && counts_depths(p)) w.depths = aligned(p.batch * p.tree.tokens * 4);
  return w;
}

// Fills in the depths of a tree that came without.
int count_depths(AttentionParams& a, void* workspace, void* stream) {
  CountDepths c;
  c.ancestors = a.p.tree.ancestors;
  c.cu_q = a.p.cu_q;
  c.depths = static_cast<int32_t*>(workspace);
  c.words = a.p.tree.words;
  c.ancestors_row = a.p.tree.ancestors_batch;
  c.tokens = a.p.tree.tokens;
  c.rows = a.p.cu_q || c.ancestors_row ? a.p.batch : 1;
  a.p.tree.depths = c.depths;
  a.p.tree.depths_batch = c.rows == 1 ? 0 : c.tokens;
  const int64_t blocks = std::min<int64_t>((c.rows * c.tokens + 127) / 128, 4096);
  return launch<CountDepths>({"count_depths", dim3(static_cast<unsigned>(blocks)), 128, 0, stream},
                             &device::count_depths, c);
}

template <class T>
int join(const AttentionParams& a, void* stream) {
  const int64_t rows = (a.p.cu_q ? a.limits.q_rows : a.p.batch * a.p.q_len) * a.p.group();
  const dim3 grid(static_cast<unsigned>((rows + kJoinWarps - 1) / kJoinWarps), static_cast<unsigned>(a.p.kv_heads));
  return launch<AttentionParams>({"join_splits", grid, kJoinWarps * kWarp, 0, stream}, &join_splits<T>, a);
}

template <class T>
int clear(const AttentionParams& a, void* stream) {
  const int64_t warps = std::max<int64_t>(1, a.limits.q_rows * a.p.heads);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((warps + kJoinWarps - 1) / kJoinWarps, 1024)));
  return launch<AttentionParams>({"clear_unowned", grid, kJoinWarps * kWarp, 0, stream}, &clear_unowned<T>, a);
}

template <class T>
int run(const AttentionProblem& p, const AttentionLimits& limits, char* memory, void* stream) {
  AttentionParams a = shared_params<T>(p, limits);
  const Workspace w = schedule(a);
  if (a.p.cu_q && a.limits.q_rows > 0)
    if (const int status = clear<T>(a, stream)) return status;
  if (a.row_blocks == 0) return 0;
  if (w.depths)
    if (const int status = count_depths(a, memory, stream)) return status;
  a.partial_out = reinterpret_cast<float*>(memory + w.depths);
  a.partial_tops = reinterpret_cast<float*>(memory + w.depths + w.partial_out);
  a.partial_sums = reinterpret_cast<float*>(memory + w.depths + w.partial_out + w.partial_row);
  const int64_t rows = a.limits.max_q_len * p.group();
  if constexpr (sizeof(T) == 4) {
    if (const int status = launch_scalar(a, stream)) return status;
  } else {
    if (a.p.cu_q || rows <= kStreamRows)
      if (const int status = launch_stream<T>(a, stream)) return status;
    if (rows > kStreamRows)
      if (const int status = launch_block<T>(a, stream)) return status;
  }
  return a.splits > 1 ? join<T>(a, stream) : 0;
}

}  // namespace

int64_t attention_workspace(const AttentionProblem& p, const AttentionLimits& limits) {
  if (p.heads == 0) return 0;
  AttentionParams a = shared_params<float>(p, limits);
  return schedule(a).bytes();
}

int attention(const AttentionProblem& p, const AttentionLimits& limits, void* workspace, void* stream) {
  if (p.head_dim > kLargestHead || p.v_dim > kLargestHead || p.dtype == DType::f64) return kUnsupported;
  if (p.heads == 0) return 0;
  char* memory = static_cast<char*>(workspace);
  switch (p.dtype) {
    case DType::bf16:
      return run<bf16>(p, limits, memory, stream);
    case DType::f16:
      return run<f16>(p, limits, memory, stream);
    default:
      return run<float>(p, limits, memory, stream);
  }
}

}  // namespace effops::device
