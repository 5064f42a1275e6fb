// Scalar conversions, for tails and for the portable build. Round to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace effops::cpu::EFFOPS_ISA {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)  // inf, NaN
    return bits_to_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude < 0x0400) {  // zero, subnormal: an exact multiple of 2^-24
    const float f = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -f : f;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
}

template <class T>
T from_float(float x);

template <>
inline double from_float<double>(float x) {
  return x;
}

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or beyond
  if (a < 0x38800000) {                                   // below 2^-14: let the FPU round
    const float shifted = bits_to_float(a) + 0.5f;        // ulp(0.5) = 2^-24
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  const uint32_t odd = (a >> 13) & 1;
  return {uint16_t(sign | ((a - 0x38000000 + 0xfff + odd) >> 13))};
}

}  // namespace effops::cpu::EFFOPS_ISA
