// A tile of a grouped product in shared memory, and which feature of w each of its columns is.
#pragma once

#include "common/device_grouped_plan.h"
#include "moe/grouped_walk.h"
#include "primitives/element.h"
#include "primitives/swizzle.h"

namespace effops::device {

inline constexpr int kBlock = 8;  // columns of a block of gates or ups

// T: elements of x and y, and of what is multiplied; U: elements of w;
// kInner: inputs of an output feature are neighbours in w, otherwise outputs of an input feature.
template <class T, class U, GroupedShape kShape, bool kInner>
struct TileShape {
  using Element = T;
  using Weight = U;
  static constexpr bool kScalar = sizeof(T) == 4, kBytes = !std::is_same_v<T, U>;
  static constexpr bool kInputsAdjacent = kInner, kRowsTransposed = false;
  static constexpr GroupedTile kTile = kScalar ? grouped_tile_f32(kShape) : grouped_tile(kShape);
  static constexpr int kRows = kTile.rows, kColumns = kTile.columns, kDepth = kTile.depth, kStages = kTile.stages;

  static constexpr int kItems = kItems16<T>, kRawItems = 16 / static_cast<int>(sizeof(U));  // of a chunk
  using RowPlace = Swizzle<kDepth / kItems>;
  using WeightPlace = Swizzle<(kInner ? kDepth : kColumns) / kItems>;
  static constexpr int kRowChunks = kDepth / kItems;
  static constexpr int kLineChunks = (kInner ? kDepth : kColumns) / kRawItems;  // of a line of w: a column or an input
  static constexpr int kLines = kInner ? kColumns : kDepth;
  static constexpr int kOwnRows = kRows * kRowChunks / kGroupedThreads;  // chunks that a thread copies
  static constexpr int kOwnWeights = kLines * kLineChunks / kGroupedThreads;
  static_assert(kOwnRows * kGroupedThreads == kRows * kRowChunks && kGroupedThreads % kRowChunks == 0, "whole rounds");
  static_assert(kOwnWeights * kGroupedThreads == kLines * kLineChunks, "whole rounds");

  // Stages of rows and weights, then what bytes of two of them became, then the output's corner.
  static constexpr int kRowBytes = kRows * RowPlace::kRowBytes;
  static constexpr int kRawBytes = kLines * kLineChunks * 16, kWeightBytes = kLines * WeightPlace::kRowBytes;
  static constexpr int kStageBytes = kRowBytes + kRawBytes;
  static constexpr int kConvertedBytes = kBytes ? 2 * kWeightBytes : 0;
  static constexpr int kPipelineBytes = kStages * kStageBytes + kConvertedBytes;

  __device__ static char* rows(char* shared, int stage) { return shared + stage * kStageBytes; }
  __device__ static char* raw(char* shared, int stage) { return rows(shared, stage) + kRowBytes; }
  __device__ static char* converted(char* shared, int step) {
    return shared + kStages * kStageBytes + step % 2 * kWeightBytes;
  }
};

// Of half a tile's columns, gates (half 0) or ups (half 1), the i-th: its column where they come in blocks, and back.
__device__ inline int column_of(int half, int i) { return i / kBlock * 2 * kBlock + half * kBlock + i % kBlock; }
__device__ inline void half_of(int column, int& half, int& i) {
  half = column / kBlock % 2;
  i = column / (2 * kBlock) * kBlock + column % kBlock;
}

// The feature of w that makes the gate (half 0) or the up value of feature y.
__device__ inline int64_t paired_feature(const GroupedProblem& p, int half, int64_t y) {
  return p.interleaved ? 2 * y + half : half * (p.out / 2) + y;
}

}  // namespace effops::device
