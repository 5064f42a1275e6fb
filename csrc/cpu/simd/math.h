// Elementary functions on vectors. exp: below 2 ulp on the whole range, 0 below -87.3 (subnormal
// results flush), +inf above 88.37, exp(-inf) = 0. float64 goes through libm.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr float kExpLowest = -87.33654f;

// 2^n p(r) with n = round(x / ln 2), for x in [-87.33, 88.37].
template <class V>
inline V exp_inside(V x) {
  const V n = min(round(x * V::set1(1.44269504088896341f)), V::set1(127.0f));
  // ln 2 in two parts, so that n * high is exact.
  V r = fmadd(n, V::set1(-0.693359375f), x);
  r = fmadd(n, V::set1(2.12194440e-4f), r);
  V p = V::set1(1.9875691500e-4f);
  p = fmadd(p, r, V::set1(1.3981999507e-3f));
  p = fmadd(p, r, V::set1(8.3334519073e-3f));
  p = fmadd(p, r, V::set1(4.1665795894e-2f));
  p = fmadd(p, r, V::set1(1.6666665459e-1f));
  p = fmadd(p, r, V::set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r + V::set1(1.0f));
  return p * pow2(n);
}

template <class V>
inline V exp(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    for (int i = 0; i < V::width; ++i) x.v[i] = std::exp(x.v[i]);
    return x;
  } else {
    const V lowest = V::set1(kExpLowest), highest = V::set1(88.37626f);
    V y = exp_inside(min(max(lowest, x), highest));
    y = where_less(x, lowest, V::zero(), y);
    y = where_less(highest, x, V::set1(std::numeric_limits<float>::infinity()), y);
    return where_less(x, V::set1(std::numeric_limits<float>::infinity()), y, y + x);
  }
}

// exp for x <= 0 or NaN, as the differences to a maximum are: two thirds of the work.
template <class V>
inline V exp_of_negative(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    return exp(x);
  } else {
    const V lowest = V::set1(kExpLowest);
    return where_less(x, lowest, V::zero(), exp_inside(max(lowest, x)));
  }
}

template <class V>
inline V sigmoid(V x) {
  return V::set1(1) / (V::set1(1) + exp(V::zero() - x));
}

// 1 - 2 / (exp(2|x|) + 1) away from zero, the odd polynomial near it.
template <class V>
inline V tanh(V x) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    for (int i = 0; i < V::width; ++i) x.v[i] = std::tanh(x.v[i]);
    return x;
  } else {
    const V a = abs(x);
    const V big = V::set1(1.0f) - V::set1(2.0f) / (exp(a + a) + V::set1(1.0f));
    const V z = x * x;
    V p = V::set1(-5.70498872745e-3f);
    p = fmadd(p, z, V::set1(2.06390887954e-2f));
    p = fmadd(p, z, V::set1(-5.37397155531e-2f));
    p = fmadd(p, z, V::set1(1.33314422036e-1f));
    p = fmadd(p, z, V::set1(-3.33332819422e-1f));
    const V small = fmadd(p * z, x, x);
    const V signed_big = where_less(x, V::zero(), V::zero() - big, big);
    return where_less(a, V::set1(0.625f), small, signed_big);
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
