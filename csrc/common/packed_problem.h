// Weights of linear layers in few bits: numbers in groups along the inner dimension, each group of an output feature
// with a step of its own. A weight is (number - zero) * step of its group.
#pragma once

#include "common/host_device.h"
#include "common/linear_problem.h"

namespace effops {

enum class PackedFormat : int8_t { int4, int8, fp8_e4m3 };

inline constexpr int kPackedPanel = 32;  // output features side by side
inline constexpr int kPackedSteps = 8;   // what inputs of a group are padded to
inline constexpr int64_t kPackedWord = 4;
inline constexpr uint32_t kPackedZero = 0xff;  // of the word that ends a group: the zero, its other bits a float32 step

// An output feature is a row of 32-bit words: for each group its numbers, input i of a word in the bits [i * bits,
// i * bits + bits), and a word of the step and the zero. Numbers of int8 and their zeros are stored plus 128, those of
// fp8 have none. Panels of 32 rows, the last of what is left, have their words transposed: [words][features].
struct PackedMatrix {
  PackedFormat format = PackedFormat::int4;
  int64_t out = 0, in = 0, group = 0;  // group: inputs that share a step; several groups: a multiple of kPackedSteps
  const char* data = nullptr;          // null: no such matrix

  EFFOPS_HD int bits() const { return format == PackedFormat::int4 ? 4 : 8; }
  EFFOPS_HD int64_t groups() const { return group == 0 ? 0 : in / group; }
  EFFOPS_HD int64_t padded_group() const { return (group + kPackedSteps - 1) / kPackedSteps * kPackedSteps; }
  EFFOPS_HD int64_t padded_in() const { return groups() * padded_group(); }
  EFFOPS_HD int64_t group_words() const { return padded_group() * bits() / 32 + 1; }
  EFFOPS_HD int64_t row_words() const { return groups() * group_words(); }
  EFFOPS_HD int64_t bytes() const { return out * row_words() * kPackedWord; }
  EFFOPS_HD int64_t panels() const { return (out + kPackedPanel - 1) / kPackedPanel; }
};

struct PackedLinearProblem {
  LinearProblem linear;  // of x and y; its weight is not used
  PackedMatrix weight;
  // The inputs of a group of a row are rounded to int8, numbers of steps of their largest size / 127, and products of
  // numbers are integers. CPU; int4 and int8.
  bool int8_activation = false;
  bool invariant = false;  // a row's bits do not depend on the number of rows
};

inline constexpr int64_t kInt8Group = 1 << 16;  // inputs whose products of bytes an int32 holds

}  // namespace effops
