// The numbers of eight inputs of a packed weight, exactly: less their zero, as float32 or as pairs of a 16-bit type.
#pragma once

#include <bit>

#include "common/packed_problem.h"
#include "primitives/convert.h"

namespace effops::device {

// Which two of eight inputs pair i has, in its lower and upper half.
template <PackedFormat kFormat>
__device__ constexpr int paired_input(int i, int half) {
  return kFormat == PackedFormat::int4 ? i + 4 * half : 2 * i + half;
}

// Words of eight inputs of a feature.
template <PackedFormat kFormat>
inline constexpr int kOctetWords = kFormat == PackedFormat::int4 ? 1 : 2;

// An unsigned byte of a word. One in the lowest byte of a float of 2^23 is their sum.
__device__ inline float byte_of(uint32_t word, int i) {
#ifdef __CUDACC__
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 + i)) - 8388608.0f;
#else
  return static_cast<float>(word >> 8 * i & 255u);
#endif
}

// A float8 e4m3 of a word: exponent and mantissa as those of a float32 that is 2^120 times too small.
__device__ inline float e4m3_of(uint32_t word, int i) {
  const uint32_t bits = word >> 8 * i & 255u;
  return std::bit_cast<float>((bits & 0x7fu) << 20 | (bits & 0x80u) << 24) * 0x1p120f;
}

template <PackedFormat kFormat>
__device__ float number_of(const uint32_t (&words)[kOctetWords<kFormat>], int i, float zero) {
  if constexpr (kFormat == PackedFormat::int4) {
    return static_cast<float>(words[0] >> 4 * i & 15u) - zero;
  } else if constexpr (kFormat == PackedFormat::int8) {
    return byte_of(words[i / 4], i % 4) - zero;
  } else {
    return e4m3_of(words[i / 4], i % 4);
  }
}

// Zeros as pair_of takes them: of int4 both halves hold it on top of the T whose lowest mantissa bits are a number.
template <class T, PackedFormat kFormat>
struct PairZero {
  static constexpr float kBase = std::is_same_v<T, bf16> ? 128 : 1024;
  uint32_t pair;
  float single;
  __device__ static PairZero of(uint32_t word) {
    const float zero = static_cast<float>(word & kPackedZero);
    return {pack<T>(kBase + zero, kBase + zero), zero};
  }
};

template <class T, PackedFormat kFormat>
__device__ uint32_t pair_of(const uint32_t (&words)[kOctetWords<kFormat>], int i, const PairZero<T, kFormat>& zero) {
#ifdef __CUDACC__
  if constexpr (kFormat == PackedFormat::int4) {
    const uint32_t two = (words[0] >> 4 * i & 0x000f000fu) | (std::is_same_v<T, bf16> ? 0x43004300u : 0x64006400u);
    if constexpr (std::is_same_v<T, bf16>) {
      const __nv_bfloat162 difference =
          __hsub2(reinterpret_cast<const __nv_bfloat162&>(two), reinterpret_cast<const __nv_bfloat162&>(zero.pair));
      return reinterpret_cast<const uint32_t&>(difference);
    } else {
      const __half2 difference =
          __hsub2(reinterpret_cast<const __half2&>(two), reinterpret_cast<const __half2&>(zero.pair));
      return reinterpret_cast<const uint32_t&>(difference);
    }
  }
#endif
  return pack<T>(number_of<kFormat>(words, paired_input<kFormat>(i, 0), zero.single),
                 number_of<kFormat>(words, paired_input<kFormat>(i, 1), zero.single));
}

}  // namespace effops::device
