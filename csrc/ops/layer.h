// Element-wise ops that other ops run too.
#pragma once

#include "ops/tensor.h"

namespace effops::ops {

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_offset);
Tensor silu_mul(Tensor x);

}  // namespace effops::ops
