// The arguments of a linear layer but its weight, checked, and the problem that they ask for.
#pragma once

#include "common/linear_problem.h"
#include "ops/layer.h"

namespace effops::ops {

// Owns copies of strided arguments. x [..., in], or [..., 2 in] if gated; the result [..., out].
struct LinearCall {
  // in < 0: what x says.
  LinearCall(const char* op, const Tensor& x, int64_t in, int64_t out, const OptionalTensor& bias,
             const OptionalTensor& residual, const OptionalTensor& norm, double norm_eps, bool gated);

  // What norm or gate made of x.
  void replace_x(const Tensor& prepared);

  // Points the problem to x, copied unless its rows lie at one distance, and to an empty result.
  Tensor result();

  Arg x;
  LinearProblem p;

 private:
  Tensor x_;
  OptionalTensor bias_, residual_, norm_;
  std::vector<int64_t> sizes_;
};

}  // namespace effops::ops
