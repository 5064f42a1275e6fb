// The SIMD vocabulary. Each instruction set compiles the kernels anew in a namespace of its own
// (EFFOPS_ISA), so that no function is shared between builds.
#pragma once

#include "cpu/simd/portable.h"

#if defined(EFFOPS_ISA_AVX512)
#include "cpu/simd/avx512.h"
#elif defined(EFFOPS_ISA_AVX2)
#include "cpu/simd/avx2.h"
#endif

namespace effops::cpu::EFFOPS_ISA {

#if defined(EFFOPS_ISA_AVX512)
using Vec = Avx512Vec;
#elif defined(EFFOPS_ISA_AVX2)
using Vec = Avx2Vec;
#else
using Vec = PortableVec<float, 8>;
#endif
using Vec64 = PortableVec<double, 4>;

// The vector that computes with elements of type T: float32 lanes, except for float64 itself.
template <class T>
struct VecOf {
  using type = Vec;
};
template <>
struct VecOf<double> {
  using type = Vec64;
};
template <class T>
using vec_of = typename VecOf<T>::type;

// Into the second-level cache: far enough ahead, it hides memory without evicting the tile in use.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Copies a strided row into contiguous memory.
template <class To, class From>
inline void copy_row(const From* from, int64_t stride, int64_t count, To* to) {
  if constexpr (sizeof(To) == sizeof(From)) {
    if (stride == 1) {
      std::memcpy(to, from, count * sizeof(To));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(to_float(from[i * stride]));
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
