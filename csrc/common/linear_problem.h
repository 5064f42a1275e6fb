// A linear layer of few rows, or several side by side, free of torch. Strides are in elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace effops {

inline constexpr int64_t kLinearRows = 16;         // more rows go to torch's GEMM
inline constexpr int64_t kLinearPiece = 64;        // output features a task
inline constexpr int64_t kLinearSerial = 1 << 17;  // bytes of weights, and multiplications, that one thread does alone

struct LinearProblem {
  DType dtype = DType::f32;
  int64_t rows = 0, in = 0, out = 0;
  const char *x = nullptr, *weight = nullptr, *bias = nullptr, *residual = nullptr;
  int64_t x_row = 0, weight_row = 0, residual_row = 0, y_row = 0;
  char* y = nullptr;
  // What happens to a row of x first, rounded as the ops of that name round: rms_norm with the weight
  // `norm` [in], or silu_mul of a row of 2 * in elements.
  const char* norm = nullptr;
  double norm_eps = 0;
  bool gated = false;
  bool silu = false;  // of x W^T + bias, before the residual
  // Several layers of one size: the distance from one to the next in each operand, 0 where all share it. The norm is
  // shared.
  int64_t groups = 1;
  int64_t x_group = 0, weight_group = 0, bias_group = 0, residual_group = 0, y_group = 0;
};

// Few rows stream the weights; torch's GEMM is the fastest for many, except in float16. `invariant`: a row's bits must
// not depend on the number of rows.
inline bool streams_linear(DType dtype, int64_t rows, bool invariant) {
  return rows <= kLinearRows || dtype == DType::f16 || invariant;
}
inline bool linear_worth_threads(const LinearProblem& p) {
  return p.groups * p.in * p.out * std::max<int64_t>(p.rows, size_of(p.dtype)) > kLinearSerial;
}

// Human-readable path of a call.
std::string explain_linear(const LinearProblem& p, const char* isa);

}  // namespace effops
