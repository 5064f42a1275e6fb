// The backward loops in float32 by FMA: sixteen own rows, eight neighbouring threads a row.
#pragma once

#include "attention/backward_load.h"
#include "attention/backward_weight.h"

namespace effops::device {

template <int kColumns>
struct BackwardScalar {
  using Rows = Tile<float, kColumns>;
  static constexpr int kOwn = kStreamRows, kRowThreads = 8, kThreads = kOwn * kRowThreads;
  using Load = PairLoad<float, kColumns, kThreads>;
  static constexpr int kVisiting = kColumns <= 128 ? 32 : 16;
  static constexpr int kEach = kVisiting / kRowThreads;          // visiting rows of a thread: member, member + 8, …
  static constexpr int kVectors = kColumns / (4 * kRowThreads);  // of four columns, a thread
  static constexpr int kOwnBytes = 2 * Rows::bytes(kOwn), kVisitingBytes = 2 * Rows::bytes(kVisiting);
  static constexpr int kStatsBytes = kVisiting * static_cast<int>(sizeof(RowStats));
  static constexpr int kWeightStride = kVisiting + 1;  // rows on different banks
  static constexpr int kBytes = kOwnBytes + kVisitingBytes + kStatsBytes + 2 * kOwn * kWeightStride * 4;
  using Sums = float[kVectors][4];

  const BackwardParams& p;
  char* shared;
  int own_row, member;  // this thread's row, and its place in the row

  __device__ BackwardScalar(const BackwardParams& params, char* memory)
      : p(params), shared(memory), own_row(threadIdx.x / kRowThreads), member(threadIdx.x % kRowThreads) {}

  __device__ char* own(int which) const { return shared + which * Rows::bytes(kOwn); }
  __device__ char* visiting(int which) const { return shared + kOwnBytes + which * Rows::bytes(kVisiting); }
  __device__ RowStats* stats() const { return reinterpret_cast<RowStats*>(shared + kOwnBytes + kVisitingBytes); }
  // Of this thread's row: weights, or gradients of scores.
  __device__ float* weights(int which) const {
    return reinterpret_cast<float*>(shared + kOwnBytes + kVisitingBytes + kStatsBytes) +
           (which * kOwn + own_row) * kWeightStride;
  }
  __device__ static const float* chunk(const char* tile, int row, int chunk) {
    return reinterpret_cast<const float*>(tile + Rows::Place::offset(row, chunk));
  }

  // The products of both pairs of tiles of this thread's row and its n-th visiting row.
  __device__ void multiply(float (&products)[kEach], int which) const {
    EFFOPS_UNROLL
    for (int n = 0; n < kEach; ++n) products[n] = 0;
    for (int c = 0; c < Rows::kChunks; ++c) {
      const float* x = chunk(own(which), own_row, c);
      EFFOPS_UNROLL
      for (int n = 0; n < kEach; ++n) {
        const float* y = chunk(visiting(which), member + n * kRowThreads, c);
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) products[n] = fmaf(x[e], y[e], products[n]);
      }
    }
  }

  // sums += the row's weights · a visiting tile.
  __device__ void add(Sums& sums, int weight, int which) const {
    for (int j = 0; j < kVisiting; ++j) {
      const float w = weights(weight)[j];
      EFFOPS_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        const float* y = chunk(visiting(which), j, member + n * kRowThreads);
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) sums[n][e] = fmaf(w, y[e], sums[n][e]);
      }
    }
  }

  __device__ void write(const TensorView4& view, int64_t offset, int64_t columns, const Sums& sums, float scale) const {
    float* to = reinterpret_cast<float*>(view.data) + offset;
    EFFOPS_UNROLL
    for (int n = 0; n < kVectors; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e)
      if (const int c = (member + n * kRowThreads) * 4 + e; c < columns) to[c * view.dim] = sums[n][e] * scale;
  }
};

}  // namespace effops::device
