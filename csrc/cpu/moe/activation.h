// The activations of experts on vectors.
#pragma once

#include "common/grouped_problem.h"
#include "cpu/simd/math.h"

namespace effops::cpu::EFFOPS_ISA {

// erfc(z) for z >= 0: exp(-z^2) P(1 / (1 + 0.37 z)), P fitted to a relative error of 1e-8 over [0, 10].
template <class V>
inline V erfc_of_positive(V z) {
  if constexpr (sizeof(typename V::scalar) == 8) {
    for (int i = 0; i < V::width; ++i) z.v[i] = std::erfc(z.v[i]);
    return z;
  } else {
    constexpr float kP[] = {-9.318257980339695e-06f, 0.20900270342826843f, 0.20578427612781525f,  0.21432866156101227f,
                            0.08191130310297012f,    0.3591444492340088f,  -0.34658971428871155f, 0.5352403521537781f,
                            -0.3249204456806183f,    0.06610776484012604f};
    const V t = V::set1(1.0f) / fmadd(V::set1(0.37f), z, V::set1(1.0f));
    V p = V::set1(kP[9]);
    for (int i = 8; i >= 0; --i) p = fmadd(p, t, V::set1(kP[i]));
    return p * exp_of_negative(V::zero() - z * z);
  }
}

// The distribution function of the normal law.
template <class V>
inline V normal_cdf(V x) {
  using C = typename V::scalar;
  const V half_tail = V::set1(C(0.5)) * erfc_of_positive(abs(x) * V::set1(C(0.70710678118654752)));
  return where_less(x, V::zero(), half_tail, V::set1(C(1)) - half_tail);
}

// Of a gate value and an up value (see Activation).
template <class V>
inline V activated(Activation activation, V g, V u) {
  using C = typename V::scalar;
  switch (activation) {
    case Activation::none:
      return g * u;
    case Activation::silu:
      return g * sigmoid(g) * u;
    case Activation::gelu:
      return g * normal_cdf(g) * u;
    case Activation::gelu_tanh: {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
      const V y = V::set1(C(1.5957691216057308)) * fmadd(g * g * g, V::set1(C(0.044715)), g);
      return g * sigmoid(y) * u;
    }
    case Activation::relu2: {
      const V r = where_less(g, V::zero(), V::zero(), g);
      return r * r * u;
    }
    case Activation::swiglu_oai: {
      const V limit = V::set1(C(7));
      const V h = where_less(limit, g, limit, g);
      const V low = where_less(u, V::zero() - limit, V::zero() - limit, u);
      return h * sigmoid(V::set1(C(1.702)) * h) * (where_less(limit, low, limit, low) + V::set1(C(1)));
    }
  }
  return g;
}

}  // namespace effops::cpu::EFFOPS_ISA
