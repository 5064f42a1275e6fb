// The product of a tile by mma, four warps.
#pragma once

#include "moe/grouped_shape.h"
#include "moe/operands.h"
#include "primitives/mma.h"

namespace effops::device {

template <class Shape>
class MmaProduct {
  using T = typename Shape::Element;
  static constexpr int kRowWarps = Shape::kRows == 16 ? 1 : 2, kColumnWarps = 4 / kRowWarps;
  static constexpr int kM = Shape::kRows / (16 * kRowWarps), kN = Shape::kColumns / (8 * kColumnWarps);

 public:
  // The sums leave in parts of some of a warp's rows.
  static constexpr int kParts = 2 * kM, kPartRows = 8, kColumns = 8 * kN;

  __device__ static int row_of(int part) { return warp_index() / kColumnWarps * (16 * kM) + part * kPartRows; }
  __device__ static int first_column() { return warp_index() % kColumnWarps * kColumns; }

  __device__ void clear() {
    EFFOPS_UNROLL
    for (int m = 0; m < kM; ++m) EFFOPS_UNROLL
    for (int n = 0; n < kN; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) sum_[m][n][e] = 0;
  }

  __device__ void add(char* rows, char* weights, int count) {
    const int first = row_of(0);
    if (first >= count) return;
    EFFOPS_UNROLL
    for (int step = 0; step < Shape::kDepth / 16; ++step) {
      uint32_t right[kN][2];
      load_right<typename Shape::WeightPlace, Shape::kInputsAdjacent>(right, weights, first_column(), step);
      EFFOPS_UNROLL
      for (int m = 0; m < kM; ++m) {
        if (first + 16 * m >= count) break;  // of the whole warp
        uint32_t left[4];
        if constexpr (Shape::kRowsTransposed)
          load_left_transposed<typename Shape::RowPlace>(left, rows, first + 16 * m, step);
        else load_left<typename Shape::RowPlace>(left, rows, first + 16 * m, step);
        mma_row<T>(sum_[m], left, right);
      }
    }
  }

  // A part's rows, `stride` floats apart.
  __device__ void put(int part, float* to, int stride) const {
    float* const at = to + lane_index() / 4 * stride + lane_index() % 4 * 2;
    EFFOPS_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (i != part) continue;  // sums stay in registers, which have no index
      EFFOPS_UNROLL
      for (int n = 0; n < kN; ++n) EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) at[8 * n + e] = sum_[i / 2][n][i % 2 * 2 + e];
    }
  }

 private:
  float sum_[kM][kN][4];
};

}  // namespace effops::device
