// mma.sync.m16n8k16: d [16,8] float32 += a [16,16] row-major · b [16,8] column-major, of bf16 or f16.
// PTX ISA, "Matrix fragments for mma.m16n8k16". With g = lane / 4 and c = lane % 4 a lane holds
//   a[0] (g, 2c..)  a[1] (g + 8, 2c..)  a[2] (g, 2c + 8..)  a[3] (g + 8, 2c + 8..), two neighbours a register,
//   b[0] rows 2c.., column g            b[1] rows 2c + 8.., column g
//   d[0..1] (g, 2c..)                   d[2..3] (g + 8, 2c..)
#pragma once

#include "common/dtype.h"
#include "primitives/platform.h"

namespace effops::device {

// A row of N tiles of 8 columns, all against the same a.
template <class T, int N>
__device__ void mma_row(float (&d)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
#ifdef __CUDACC__
  EFFOPS_UNROLL
  for (int n = 0; n < N; ++n) {
    if constexpr (std::is_same_v<T, bf16>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
          : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
          : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
    }
  }
#else
  simt::mma_m16n8k16(std::is_same_v<T, bf16>, &d[0][0], a, &b[0][0], N);
#endif
}

}  // namespace effops::device
