// A block's dynamic shared memory. Kernels carve it by constant offsets; there are no static __shared__ arrays, so
// that the host machine knows every byte.
#pragma once

#include "primitives/platform.h"

namespace effops::device {

// 128-byte aligned.
__device__ inline char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char effops_shared_memory[];
  return effops_shared_memory;
#else
  return simt::shared_memory();
#endif
}

#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
#endif

}  // namespace effops::device
