// A linear layer whose weight is quantised: numbers of few bits in groups along the inner dimension, each group of an
// output feature with a step of its own.
#pragma once

#include "common/linear_problem.h"

namespace effops {

inline constexpr int kPackedPanel = 32;  // output features side by side
inline constexpr int kPackedSteps = 8;   // inputs that an int4 word holds; what inputs are padded to

// Memory of a panel, inputs padded with zeros to whole words: int8 [inputs][32], or int4 as words [inputs / 8][32],
// input i of a word being its bits [4i, 4i + 4). A weight is (number - zero) * scale of its group.
struct PackedLinearProblem {
  LinearProblem linear;  // of x and y; its weight is not used
  int bits = 4;
  int64_t group = 0;                                // inputs of a group; several groups: a multiple of kPackedSteps
  const char* data = nullptr;                       // [panels]
  const float *scales = nullptr, *zeros = nullptr;  // [panels][groups][32]; null zeros: 8 for int4, 0 for int8

  int64_t panels() const { return (linear.out + kPackedPanel - 1) / kPackedPanel; }
  int64_t groups() const { return group == 0 ? 0 : linear.in / group; }
  int64_t padded_group() const { return (group + kPackedSteps - 1) / kPackedSteps * kPackedSteps; }
  int64_t padded_in() const { return groups() * padded_group(); }
  int64_t panel_bytes() const { return padded_in() * kPackedPanel * bits / 8; }
};

}  // namespace effops
