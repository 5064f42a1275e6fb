// The running softmax of one row, in base 2 (Milakov and Gimelshein, 2018).
#pragma once

#include "primitives/math.h"

namespace effops::device {

struct RowSoftmax {
  float top = -INFINITY, sum = 0;

  // Takes in a tile whose largest score is `tile_top`: the factor for everything summed before.
  __device__ float rescale(float tile_top) {
    const float before = top;
    top = before > tile_top ? before : tile_top;
    const float factor = exp2_approx(before - origin());
    sum *= factor;
    return factor;
  }
  // Where exponents are counted from: finite, also for a row that has seen nothing.
  __device__ float origin() const { return top == -INFINITY ? 0.0f : top; }
  __device__ float weight(float score) const { return exp2_approx(score - origin()); }
  __device__ float lse2() const { return sum == 0 ? -INFINITY : top + log2f(sum); }
};

}  // namespace effops::device
