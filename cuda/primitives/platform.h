// The two worlds that every kernel is compiled for: nvcc, and a host compiler with the simt machine, which knows
// CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync …). Kernels include primitives and nothing else.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define EFFOPS_UNROLL _Pragma("unroll")
#define EFFOPS_KEEP_LOOP _Pragma("unroll 1")
#else
#include "simt/device.h"
#define EFFOPS_UNROLL
#define EFFOPS_KEEP_LOOP
#endif

namespace effops::device {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return threadIdx.x % kWarp; }
__device__ inline int warp_index() { return threadIdx.x / kWarp; }

}  // namespace effops::device
