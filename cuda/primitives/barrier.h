// Barriers of some of a block's warps. Every lane of a warp calls; `threads`, a multiple of 32, counts those that meet.
#pragma once

#include "primitives/platform.h"

namespace effops::device {

// Ids 1 to 15; 0 is __syncthreads.
__device__ inline void named_barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  simt::named_barrier(id, threads, true);
#endif
}

// Counts as met and goes on: what these warps wrote before is seen by those that wait.
__device__ inline void named_barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
  simt::named_barrier(id, threads, false);
#endif
}

}  // namespace effops::device
