// What the attention kernels are launched with.
#pragma once

#include "library.h"
#include "primitives/divide.h"

namespace effops::device {

struct AttentionParams {
  AttentionProblem p;
  AttentionLimits limits;
  FastDivide group, page;
  // Scores in base 2: cap * tanh(factor * q·k) with a softcap, factor * q·k without.
  float factor = 1, cap = 0;
  static constexpr int kAlignedQ = 1, kAlignedK = 2, kAlignedV = 4;
  int aligned = 0;  // which rows can be read in 16-byte pieces

  int row_blocks = 1;  // of every sequence, where queries are not ragged
  int splits = 1;      // the most that a row block has
  // Of splits: weighted sums [batch, kv_heads, slots, v_dim], and each row's largest score and sum of weights.
  int64_t slots = 0;
  float *partial_out = nullptr, *partial_tops = nullptr, *partial_sums = nullptr;
};

}  // namespace effops::device
