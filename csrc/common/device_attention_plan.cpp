#include "common/device_attention_plan.h"

#include <sstream>

namespace effops::device {

std::string explain_attention(const AttentionProblem& p, const char* backend) {
  AttentionLimits limits;
  limits.max_kv_len = p.kv_capacity;
  const AttentionPlan plan = plan_attention(p, limits);
  const bool float32 = p.dtype == DType::f32;
  const int64_t size = size_of(p.dtype), blocks = p.batch * p.kv_heads * plan.row_blocks;
  std::ostringstream o;
  o << "backend: " << backend << "\n"
    << "loop: "
    << (float32                    ? "scalar"
        : plan.rows <= kStreamRows ? "streaming"
                                   : "gemm")
    << "\n"
    << "rows_per_kv_head: " << plan.rows << "\n"
    << "row_block: " << plan.block << "\n"
    << "tile_keys: " << kTileKeys << "\n"
    << "splits: " << plan.splits << " at most\n"
    << "thread_blocks: " << blocks * plan.splits << "\n"
    << "workspace_bytes: " << p.batch * p.kv_heads * plan.slots * (p.v_dim + 2) * 4 << "\n"
    << "kv_bytes: " << p.batch * p.kv_heads * p.kv_capacity * (p.head_dim + p.v_dim) * size << "\n"
    << "flops: " << 2 * p.batch * p.kv_heads * plan.rows * p.kv_capacity * (p.head_dim + p.v_dim) << "\n";
  return o.str();
}

}  // namespace effops::device
