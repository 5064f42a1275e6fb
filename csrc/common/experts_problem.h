// A layer of experts on the CPU, free of torch.
#pragma once

#include "common/grouped_problem.h"
#include "common/packed_problem.h"

namespace effops {

// out[t] = sum of weights[t, j] down(activation(gate_up(x[t]))) over the choices j. The two products share rows
// (slots), groups (experts), offsets and order; the first has no y, the second no x.
struct ExpertsProblem {
  GroupedProblem gate_up, down;
  // Weights in few bits: the first expert's matrices, whose rows are the columns of tiles (cpu/moe/epilogue.h), the
  // others' behind it.
  PackedMatrix packed_gate_up, packed_down;
  int64_t tokens = 0;
  const char* weights = nullptr;  // [tokens, k] contiguous, float32 (float64 for float64)
  char* out = nullptr;            // [tokens, down.out] contiguous
};

}  // namespace effops
