#pragma once

#include "attention/block.h"
#include "attention/launch.h"

namespace effops::device {

template <class T>
int launch_block(const AttentionParams& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(row_blocks_in_all(a, kBlockRows)), static_cast<unsigned>(a.p.kv_heads),
                  static_cast<unsigned>(min_of(a.splits, split_limit(kStreamRows + 1, kBlockRows))));
  return with_columns<64, 96, 128, 192, 256>(max_of(a.p.head_dim, a.p.v_dim), [&](auto columns) {
    using Loop = Block<T, columns()>;
    return launch<AttentionParams>({"block_attention", grid, Loop::kThreads, Loop::kSharedBytes, stream},
                                   &block_attention<T, columns()>, a);
  });
}

}  // namespace effops::device
