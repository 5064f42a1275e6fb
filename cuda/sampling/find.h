// Inverse of a running sum in the order of ids, without writing the sums down.
#pragma once

#include "primitives/reduce.h"

namespace effops::device {

// The least i of [0, count) with mass(0) + … + mass(i) > goal; where rounding leaves the sum short of it, the last i
// with a mass; 0 where none has. Each round the warps sum up a piece each, and one piece is searched on. For blocks of
// two warps or more; `scratch`: 32 values of shared memory.
template <class Mass>
__device__ int64_t find_sum(int64_t count, double goal, double* scratch, Mass&& mass) {
  const int warps = blockDim.x / kWarp;
  int64_t begin = 0, end = count;
  double before = 0;
  while (end - begin > 1) {
    const int64_t piece = (end - begin + warps - 1) / warps;
    const int64_t own = begin + warp_index() * piece, own_end = min_of(end, own + piece);
    double sum = 0;
    for (int64_t i = own + lane_index(); i < own_end; i += kWarp) sum += mass(i);
    sum = reduce_lanes<kWarp>(sum, Sum());
    if (lane_index() == 0) scratch[warp_index()] = sum;
    __syncthreads();
    int chosen = 0;
    double reached = before;
    for (int w = 0; w < warps && reached <= goal; ++w) {
      if (!(scratch[w] > 0)) continue;
      chosen = w;
      before = reached;
      reached += scratch[w];
    }
    __syncthreads();
    begin += chosen * piece;
    end = min_of(end, begin + piece);
  }
  return begin;
}

}  // namespace effops::device
