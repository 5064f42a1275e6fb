// What the backward kernels are launched with.
#pragma once

#include "attention/params.h"

namespace effops::device {

// Of one row, for base-2 scores s: its weights are exp2(s - lse2), and delta is taken off their gradients. lse2 is
// +inf for a row without keys: all weights are 0.
struct alignas(8) RowStats {
  float lse2 = INFINITY, delta = 0;
};

struct BackwardParams {
  AttentionParams a;
  AttentionGradients g;
  RowView stats;  // of RowStats
  bool aligned_d_out = false;
  int key_blocks = 0;  // of every sequence, where keys are not ragged
  float scale = 1;
};

}  // namespace effops::device
