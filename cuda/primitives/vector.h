// 16-byte accesses to global or shared memory. Addresses are 16-byte aligned.
#pragma once

#include <bit>

#include "primitives/platform.h"

namespace effops::device {

struct alignas(16) Vector16 {
  uint32_t word[4];
};
struct alignas(16) Float4 {
  float x[4];
};

// T of 16 bytes.
template <class T>
__device__ T load16_as(const void* from) {
#ifdef __CUDACC__
  return *static_cast<const T*>(from);
#else
  return std::bit_cast<T>(simt::load16(from));
#endif
}

__device__ inline Vector16 load16(const void* from) { return load16_as<Vector16>(from); }

__device__ inline Float4 load_float4(const void* from) { return load16_as<Float4>(from); }

__device__ inline void store16(void* to, const Vector16& x) {
#ifdef __CUDACC__
  *static_cast<Vector16*>(to) = x;
#else
  simt::store16(to, std::bit_cast<simt::Words16>(x));
#endif
}

}  // namespace effops::device
