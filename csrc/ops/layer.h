// Ops of a decoder layer that other ops run too.
#pragma once

#include "common/layer_problem.h"
#include "ops/tensor.h"

namespace effops::ops {

using OptionalTensor = std::optional<Tensor>;

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_offset);
Tensor silu_mul(Tensor x);
Tensor packed_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor norm,
                     double norm_eps, bool gated, bool int8_activation = false, bool batch_invariant = false);

// The angles of heads of `dim` elements of B sequences of T tokens. The tables are made contiguous
// where they are not.
Angles angles_of(const Arg& like, int64_t batch, int64_t tokens, int64_t dim, Tensor& cos, Tensor& sin,
                 const Tensor& positions);

}  // namespace effops::ops
