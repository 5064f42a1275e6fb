// The backward loops of one element type, and their grids.
#pragma once

#include "attention/backward_params.h"
#include "attention/key_block.h"
#include "attention/launch.h"

namespace effops::device {

template <class T>
int launch_backward_keys(const BackwardParams& p, void* stream);
template <class T>
int launch_backward_queries(const BackwardParams& p, void* stream);

inline dim3 key_grid(const BackwardParams& p, int block, int passes) {
  return dim3(static_cast<unsigned>(key_blocks_in_all(p.a, p.key_blocks, block)), static_cast<unsigned>(p.a.p.kv_heads),
              static_cast<unsigned>(passes));
}
inline dim3 query_grid(const BackwardParams& p, int block) {
  return dim3(static_cast<unsigned>(row_blocks_in_all(p.a, block)), static_cast<unsigned>(p.a.p.kv_heads));
}

}  // namespace effops::device
