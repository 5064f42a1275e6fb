// The product of a float32 tile by FMA: eight neighbouring threads a row, eight columns each.
#pragma once

#include "moe/grouped_shape.h"
#include "primitives/vector.h"

namespace effops::device {

template <class Shape>
class ScalarProduct {
  static constexpr int kRowThreads = 8, kOwn = Shape::kColumns / kRowThreads;
  static constexpr int kRowStep = kGroupedThreads / kRowThreads, kM = Shape::kRows / kRowStep;
  static_assert(kOwn == 8, "two vectors of columns a thread");

 public:
  static constexpr int kParts = kM, kPartRows = kWarp / kRowThreads, kColumns = Shape::kColumns;

  __device__ static int row_of(int part) { return part * kRowStep + warp_index() * kPartRows; }
  __device__ static int first_column() { return 0; }

  __device__ void clear() {
    EFFOPS_UNROLL
    for (int m = 0; m < kM; ++m) EFFOPS_UNROLL
    for (int n = 0; n < kOwn; ++n) sum_[m][n] = 0;
  }

  __device__ void add(char* rows, char* weights, int count) {
    const int member = threadIdx.x % kRowThreads, row = threadIdx.x / kRowThreads;
    if (row_of(0) >= count) return;
    for (int chunk = 0; chunk < Shape::kDepth / 4; ++chunk) {
      Float4 x[kM];
      EFFOPS_UNROLL
      for (int m = 0; m < kM; ++m) x[m] = load_inputs(rows, row + m * kRowStep, chunk);
      if constexpr (Shape::kInputsAdjacent) {
        EFFOPS_UNROLL
        for (int n = 0; n < kOwn; ++n) {
          const Float4 w = load_float4(weights + Shape::WeightPlace::offset(member + n * kRowThreads, chunk));
          EFFOPS_UNROLL
          for (int m = 0; m < kM; ++m) EFFOPS_UNROLL
          for (int e = 0; e < 4; ++e) sum_[m][n] = fmaf(x[m].x[e], w.x[e], sum_[m][n]);
        }
      } else {
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) EFFOPS_UNROLL
        for (int v = 0; v < 2; ++v) {
          const Float4 w = load_float4(weights + Shape::WeightPlace::offset(4 * chunk + e, member + v * kRowThreads));
          EFFOPS_UNROLL
          for (int m = 0; m < kM; ++m) EFFOPS_UNROLL
          for (int i = 0; i < 4; ++i) sum_[m][4 * v + i] = fmaf(x[m].x[e], w.x[i], sum_[m][4 * v + i]);
        }
      }
    }
  }

  __device__ void put(int part, float* to, int stride) const {
    const int member = threadIdx.x % kRowThreads;
    float* const at = to + lane_index() / kRowThreads * stride;
    EFFOPS_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (i != part) continue;
      EFFOPS_UNROLL
      for (int n = 0; n < kOwn; ++n)
        at[Shape::kInputsAdjacent ? member + n * kRowThreads : n / 4 * 4 * kRowThreads + 4 * member + n % 4] =
            sum_[i][n];
    }
  }

 private:
  __device__ static Float4 load_inputs(char* rows, int row, int chunk) {
    if constexpr (!Shape::kRowsTransposed) {
      return load_float4(rows + Shape::RowPlace::offset(row, chunk));
    } else {
      Float4 x;
      EFFOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        x.x[e] = reinterpret_cast<const float*>(rows + Shape::RowPlace::offset(4 * chunk + e, row / 4))[row % 4];
      return x;
    }
  }

  float sum_[kM][kOwn];
};

}  // namespace effops::device
