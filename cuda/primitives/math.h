// The functions of a softmax in base 2.
#pragma once

#include <cmath>

#include "primitives/platform.h"

namespace effops::device {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Within 2 ulp of exp2f for results that are normal numbers; smaller ones are 0.
__device__ inline float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

}  // namespace effops::device
