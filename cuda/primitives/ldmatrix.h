// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory into mma fragments. Lane l names row l % 8 of matrix
// l / 8 (16 bytes, 16-byte aligned); register i of every lane comes from matrix i: elements 2c and 2c + 1 of row g,
// with g = lane / 4 and c = lane % 4; transposed, elements g of rows 2c and 2c + 1.
#pragma once

#include "primitives/shared_memory.h"

namespace effops::device {

// N times four matrices; rows[n] is this lane's row of the n-th four.
template <bool kTransposed = false, int N>
__device__ void ldmatrix_x4(uint32_t (&to)[N][4], const void* const (&rows)[N]) {
#ifdef __CUDACC__
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n) {
    const unsigned at = shared_address(rows[n]);
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                   : "=r"(to[n][0]), "=r"(to[n][1]), "=r"(to[n][2]), "=r"(to[n][3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                   : "=r"(to[n][0]), "=r"(to[n][1]), "=r"(to[n][2]), "=r"(to[n][3])
                   : "r"(at)
                   : "memory");
    }
  }
#else
  simt::ldmatrix_x4(kTransposed, &to[0][0], rows, N);
#endif
}

}  // namespace effops::device
