// The schedule of attention on a device: which loop, blocks of rows, splits of keys, partial results. From sizes and
// upper bounds alone, for lengths are on the device; kernels find their own share and leave early.
#pragma once

#include <cstdint>
#include <string>

#include "common/attention_tiles.h"

namespace effops::device {

inline constexpr int kStreamRows = 16;     // rows of a KV head up to which the streaming loop serves a sequence
inline constexpr int kBlockRows = 64;      // rows of a GEMM-shaped block; float32 has kStreamRows in its one loop
inline constexpr int kSplitRows = 512;     // more rows are parallel enough without splits
inline constexpr int kSplitTiles = 4;      // tiles of keys that a split has at least
inline constexpr int kPartialRows = 1024;  // partial results of a sequence and KV head

// What the host knows of lengths that only the device can read.
struct AttentionLimits {
  int64_t q_rows = 0;      // rows of q where it is ragged, sequences' or not
  int64_t max_q_len = 0;   // of a sequence
  int64_t max_kv_len = 0;  // of a sequence
  int64_t k_rows = 0;      // rows of k where it is ragged
  int64_t pages = 0;       // of a paged cache
};

EFFOPS_HD inline int block_rows(bool float32, int64_t rows) {
  return float32 || rows <= kStreamRows ? kStreamRows : kBlockRows;
}
// The most splits of a row block of a sequence of so many rows.
EFFOPS_HD inline int split_limit(int rows, int block) {
  return rows > kSplitRows ? 1 : kPartialRows / ((rows + block - 1) / block * block);
}

struct AttentionPlan {
  int64_t rows = 0;    // of a sequence and KV head, at most
  int block = 1;       // rows of a row block of such a sequence
  int row_blocks = 0;  // of every sequence, where queries are not ragged
  int splits = 1;      // that any row block may have
  int64_t slots = 0;   // rows of partial results for a sequence and KV head
};

inline AttentionPlan plan_attention(const AttentionProblem& p, const AttentionLimits& limits) {
  AttentionPlan plan;
  plan.rows = (p.cu_q ? limits.max_q_len : p.q_len) * p.group();
  if (p.batch == 0 || plan.rows == 0) return plan;
  const bool float32 = p.dtype == DType::f32;
  plan.block = block_rows(float32, plan.rows);
  plan.row_blocks = static_cast<int>((plan.rows + plan.block - 1) / plan.block);
  const int64_t tiles = (limits.max_kv_len + kTileKeys - 1) / kTileKeys + 1;      // sinks may cut one in two
  const int64_t least = p.cu_q ? 1 : min_of<int64_t>(plan.rows, kSplitRows + 1);  // a ragged batch may have short ones
  plan.splits = static_cast<int>(min_of<int64_t>(max_of<int64_t>(1, (tiles + kSplitTiles - 1) / kSplitTiles),
                                                 split_limit(static_cast<int>(least), block_rows(float32, least))));
  if (plan.splits > 1)
    plan.slots = p.cu_q ? min_of<int64_t>(kPartialRows, int64_t(plan.row_blocks) * plan.block * plan.splits)
                        : plan.rows * plan.splits;
  return plan;
}

// Human-readable schedule of a dense batch whose sequences have all keys.
std::string explain_attention(const AttentionProblem& p, const char* backend);

}  // namespace effops::device
