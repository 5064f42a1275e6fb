// The activations of experts, of a gate g and an up value u. NaN stays NaN.
#pragma once

#include <cmath>

#include "common/grouped_problem.h"
#include "primitives/platform.h"

namespace effops::device {

template <Activation kActivation>
__device__ float activate(float g, float u) {
  if constexpr (kActivation == Activation::silu) {
    return g / (1.0f + expf(-g)) * u;
  } else if constexpr (kActivation == Activation::gelu) {  // no 1 + erf or tanh: small results keep their digits
    return 0.5f * g * erfcf(g * -0.7071067811865476f) * u;
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    return g / (1.0f + expf(-1.5957691216057308f * (g + 0.044715f * g * g * g))) * u;
  } else if constexpr (kActivation == Activation::relu2) {
    const float positive = g < 0 ? 0 : g;
    return positive * positive * u;
  } else if constexpr (kActivation == Activation::swiglu_oai) {
    const float gate = g > 7 ? 7 : g, up = u > 7 ? 7 : u < -7 ? -7 : u;
    return gate / (1.0f + expf(-1.702f * gate)) * (up + 1);
  } else {
    return g * u;
  }
}

template <Activation kActivation, int N>
__device__ void activate_all(float (&g)[N], const float (&u)[N]) {
  EFFOPS_UNROLL
  for (int i = 0; i < N; ++i) g[i] = activate<kActivation>(g[i], u[i]);
}

// To g.
template <int N>
__device__ void activate(Activation activation, float (&g)[N], const float (&u)[N]) {
  switch (activation) {
    case Activation::none:
      return activate_all<Activation::none>(g, u);
    case Activation::silu:
      return activate_all<Activation::silu>(g, u);
    case Activation::gelu:
      return activate_all<Activation::gelu>(g, u);
    case Activation::gelu_tanh:
      return activate_all<Activation::gelu_tanh>(g, u);
    case Activation::relu2:
      return activate_all<Activation::relu2>(g, u);
    case Activation::swiglu_oai:
      return activate_all<Activation::swiglu_oai>(g, u);
  }
}

}  // namespace effops::device
