// The schedule of one attention call: pure arithmetic on shapes, printable, without a device.
// Sizes are fixed rather than fitted to the batch or the threads, so that a sequence's result does
// not depend on what it is computed beside.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/attention_tiles.h"

namespace effops {

inline constexpr int64_t kStreamRows = 40;  // up to here the streaming loop, beyond it the GEMM-shaped one
inline constexpr int64_t kNarrowRows = 16;  // the same for heads of kNarrow elements: packing costs the GEMM less
inline constexpr int64_t kNarrow = 64;
inline constexpr int64_t kBlockRows = 96;        // rows of a GEMM-shaped block
inline constexpr int64_t kStreamSplit = 16;      // tiles a split of a streaming task
inline constexpr int64_t kBlockSplit = 64;       // tiles a split of a GEMM-shaped task, while blocks are few
inline constexpr int64_t kSplitRows = 512;       // more rows than this are parallel enough without splits
inline constexpr int64_t kSerialWork = 1 << 16;  // multiplications below which threads cost more than they give

struct AttentionTask {  // rows [row_begin, row_end) of (sequence, KV head) against tiles [first_tile, last_tile)
  int64_t sequence, kv_head, row_begin, row_end, first_tile, last_tile;
  int32_t splits;
  int64_t partial;  // first row of this split's partial result; -1 writes the output directly
};

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  int64_t partial_rows = 0;     // rows of workspace for partial results
  int64_t multiplications = 0;  // of both products
};

inline bool streams(int64_t rows, int64_t dim) { return rows <= (dim <= kNarrow ? kNarrowRows : kStreamRows); }

AttentionPlan plan_attention(const AttentionProblem& p);

// Human-readable schedule of a dense batch.
std::string explain_attention(const AttentionProblem& p, const char* isa);

}  // namespace effops
