// The GEMM-shaped backward loops: a thread block owns 64 rows of a pair of tiles, sixteen a warp, and is visited by
// tiles of the other pair (FlashAttention-2; Dao 2023, algorithm 2, as two loops: no sum is shared by blocks).
#pragma once

#include "attention/backward_load.h"
#include "attention/backward_weight.h"
#include "attention/fragments.h"

namespace effops::device {

template <class T, int kColumns>
struct BackwardTiles {
  using Rows = Tile<T, kColumns>;
  static constexpr int kOwn = kBlockRows, kWarps = kOwn / 16, kThreads = kWarps * kWarp;
  using Load = PairLoad<T, kColumns, kThreads>;
  // Fewer where sums of wide rows fill the registers, or tiles the shared memory.
  static constexpr int kVisiting = kColumns <= 96 ? 64 : 32, kStages = kColumns <= 192 ? 2 : 1;
  static constexpr int kOwnBytes = 2 * Rows::bytes(kOwn), kVisitingBytes = 2 * Rows::bytes(kVisiting);
  static constexpr int kStatsBytes = kVisiting * static_cast<int>(sizeof(RowStats));
  static constexpr int kBytes = kOwnBytes + kStages * (kVisitingBytes + kStatsBytes);
  using Products = float[kVisiting / 8][4];  // of this warp's rows and the visiting ones

  char* shared;

  __device__ char* own(int which) const { return shared + which * Rows::bytes(kOwn); }
  __device__ char* visiting(int stage, int which) const {
    return shared + kOwnBytes + stage * kVisitingBytes + which * Rows::bytes(kVisiting);
  }
  __device__ RowStats* stats(int stage) const {
    return reinterpret_cast<RowStats*>(shared + kOwnBytes + kStages * kVisitingBytes + stage * kStatsBytes);
  }

  // <own, visiting> of both tiles of the pairs: of queries and keys, of output gradients and values.
  __device__ void multiply(Products& products, int stage, int which) const {
    add_row_products<T, kColumns>(products, own(which), warp_index() * 16, visiting(stage, which));
  }
  // sums += weights · a visiting tile.
  __device__ void add(RowSums<kColumns>& sums, const Products& weights, int stage, int which) const {
    add_product<T, kColumns>(sums, weights, visiting(stage, which));
  }

  // This lane's upper and lower own row.
  __device__ static int own_row(int half) { return warp_index() * 16 + lane_index() / 4 + 8 * half; }
  // This lane's columns of eight of a result tile.
  __device__ static int column(int tile, int which) { return tile * 8 + lane_index() % 4 * 2 + which; }

  // The lane's half of a sum to a row of `columns` elements.
  __device__ static void write(T* to, int64_t stride, int columns, const RowSums<kColumns>& sums, int half,
                               float scale) {
    constexpr int kGroup = 2 * kStepsAtOnce<kColumns>;
    EFFOPS_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 2; ++e)
      if (const int c = column(n, e); c < columns)
        to[c * stride] = narrow<T>(sums[n / kGroup][n % kGroup][2 * half + e] * scale);
  }
};

}  // namespace effops::device
