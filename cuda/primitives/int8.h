// Signed bytes to the element types, exactly: without conversion instructions, which are few a cycle.
#pragma once

#include <bit>

#include "primitives/convert.h"
#include "primitives/vector.h"

namespace effops::device {

// The bytes of a word, lowest first. x + 128 in the lowest byte of a float of 2^23 is that sum.
__device__ inline void widen_int8(float (&to)[4], uint32_t four) {
#ifdef __CUDACC__
  const uint32_t shifted = four ^ 0x80808080u;
  EFFOPS_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7540 + i)) - 8388736.0f;
#else
  for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(four >> 8 * i);
#endif
}

// The dot product of four signed bytes with four others, and c.
__device__ inline int32_t dot_int8(int32_t a, int32_t b, int32_t c) {
#ifdef __CUDACC__
  return __dp4a(a, b, c);
#else
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
#endif
}

// Sixteen bytes to sixteen elements of T: sizeof(T) times 16 bytes.
template <class T>
__device__ void widen_int8(Vector16 (&to)[sizeof(T)], const Vector16& from) {
  EFFOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    float x[4];
    widen_int8(x, from.word[i]);
    if constexpr (sizeof(T) == 4) {
      EFFOPS_UNROLL
      for (int e = 0; e < 4; ++e) to[i].word[e] = std::bit_cast<uint32_t>(x[e]);
    } else {
      EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) {
#ifdef __CUDACC__
        if constexpr (std::is_same_v<T, bf16>) {  // eight significant bits: the upper half of the float is all of it
          to[i / 2].word[i % 2 * 2 + e] = __byte_perm(__float_as_uint(x[2 * e]), __float_as_uint(x[2 * e + 1]), 0x7632);
          continue;
        }
#endif
        to[i / 2].word[i % 2 * 2 + e] = pack<T>(x[2 * e], x[2 * e + 1]);
      }
    }
  }
}

}  // namespace effops::device
