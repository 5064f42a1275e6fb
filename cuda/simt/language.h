// Function qualifiers, dim3 and the built-in variables.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace effops::device::simt {

// They never change within a fiber, and by value they cost the instrumented code no memory access.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] uint3 block_size();
[[gnu::const]] uint3 grid_size();

}  // namespace effops::device::simt

#define threadIdx (::effops::device::simt::thread_index())
#define blockIdx (::effops::device::simt::block_index())
#define blockDim (::effops::device::simt::block_size())
#define gridDim (::effops::device::simt::grid_size())
