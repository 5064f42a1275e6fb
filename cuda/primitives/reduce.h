// Sums and maxima over lanes and over blocks. Every lane gets the result; the order of additions is fixed.
#pragma once

#include "primitives/shared_memory.h"

namespace effops::device {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Over groups of kLanes neighbouring lanes (a power of two).
template <int kLanes, class T, class Op>
__device__ T reduce_lanes(T x, Op op) {
  EFFOPS_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Over a block of up to 1024 threads. `scratch`: 32 values of shared memory, free again after the call.
template <class T, class Op>
__device__ T reduce_block(T x, Op op, T neutral, T* scratch) {
  x = reduce_lanes<kWarp>(x, op);
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  x = reduce_lanes<kWarp>(lane_index() < warps ? scratch[lane_index()] : neutral, op);
  __syncthreads();
  return x;
}

}  // namespace effops::device
