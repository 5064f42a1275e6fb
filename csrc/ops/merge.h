// The checked problem of merge_states, the same for every backend.
#pragma once

#include "common/layer_problem.h"
#include "ops/tensor.h"

namespace effops::ops {

struct MergeCall {
  MergeCall(Tensor outs, Tensor lses);

  MergeProblem p;
  Tensor outs, lses, out, lse;  // inputs made contiguous, outputs allocated
  int32_t device_index;
};

}  // namespace effops::ops
