// Which scores of a tile count.
#pragma once

#include "attention/row_block.h"

namespace effops::device {

struct RowMask {
  int64_t token = 0, position = 0;

  RowMask() = default;
  __device__ RowMask(const AttentionParams& a, const RowBlock& b, int r)
      : token(RowBlock::token_of(a, r)), position(b.s.position(token)) {}

  __device__ bool allows(const RowBlock& b, int64_t j) const {
    if (b.listed.list) return j < b.see.len && b.listed.token(j) >= 0;
    if (j >= b.see.tree_begin) return j < b.see.len && tree_allows(b.see, b.s, token, j - b.see.tree_begin);
    return b.see.allowed(position, j);
  }
};

// Does every row of the block see every key of [first, first + count)?
__device__ inline bool all_visible(const RowBlock& b, int64_t first, int64_t count) {
  const Visibility& see = b.see;
  const int64_t last = first + count - 1;
  return !b.listed.list && first >= see.start && last < see.len && last < see.tree_begin &&
         (!see.causal || last <= b.positions.lowest || last < see.prefix_end) &&
         (see.window == 0 || first > b.positions.highest - see.window || last < see.sinks_end);
}

}  // namespace effops::device
