// Division of small non-negative integers by a divisor known at launch: a multiplication and a shift.
#pragma once

#include "primitives/platform.h"

namespace effops::device {

// Exact for dividends below 2^31 and divisors from 1 to 2^31 - 1 (Granlund and Montgomery, 1994).
struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    if (d == 1) return;
    uint32_t bits = 0;
    while ((uint64_t(1) << bits) < d) ++bits;  // ceil(log2 d)
    const int power = 31 + bits;
    multiplier = static_cast<uint32_t>(((uint64_t(1) << power) + d - 1) / d);
    shift = power - 32;
  }

  __device__ uint32_t quotient(uint32_t n) const {
    if (divisor == 1) return n;
#ifdef __CUDACC__
    return __umulhi(n, multiplier) >> shift;
#else
    return static_cast<uint32_t>(uint64_t(n) * multiplier >> 32) >> shift;
#endif
  }
  __device__ uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

}  // namespace effops::device
