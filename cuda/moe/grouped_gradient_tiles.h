// dw[g] = x^T dy: a block has a tile of one group's matrix, and the group's rows are the depth. Nothing is shared by
// blocks, so that nothing is added atomically.
#pragma once

#include "moe/copy_chunk.h"
#include "moe/group_rows.h"
#include "moe/grouped_gradient_params.h"
#include "moe/grouped_mma.h"
#include "moe/grouped_scalar.h"

namespace effops::device {

// Of products of rows that both lie across: x [depth, inputs], dy [depth, outputs].
template <class T>
struct GradientShape {
  using Element = T;
  static constexpr bool kInputsAdjacent = false, kRowsTransposed = true, kScalar = sizeof(T) == 4;
  static constexpr int kRows = gradient_tile(kScalar), kColumns = kRows, kDepth = 32, kStages = kScalar ? 3 : 4;
  static constexpr int kItems = kItems16<T>, kLineChunks = kColumns / kItems;
  using RowPlace = Swizzle<kLineChunks>;
  using WeightPlace = RowPlace;
  static constexpr int kTileBytes = kDepth * RowPlace::kRowBytes, kStageBytes = 2 * kTileBytes;
};

template <class T>
class GradientTiles {
  using Shape = GradientShape<T>;
  using Product = std::conditional_t<Shape::kScalar, ScalarProduct<Shape>, MmaProduct<Shape>>;
  static constexpr int kTile = Shape::kRows, kStages = Shape::kStages, kItems = Shape::kItems;
  static constexpr int kCornerStride = Product::kColumns + 8, kCornerFloats = Product::kPartRows * kCornerStride;

 public:
  static constexpr int kSharedBytes =
      kStages * Shape::kStageBytes + kGroupedThreads / kWarp * kCornerFloats * static_cast<int>(sizeof(float));

  __device__ GradientTiles(const GradientParams& a, char* shared)
      : a_(a),
        p_(a.p),
        shared_(shared),
        corner_(reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes) + warp_index() * kCornerFloats) {}

  __device__ void run(int64_t tile) {
    const int64_t in_matrix = int64_t(a_.in_tiles) * a_.out_tiles, group = tile / in_matrix;
    const int place = static_cast<int>(tile - group * in_matrix);
    input_ = place / a_.out_tiles * kTile;
    output_ = place % a_.out_tiles * kTile;
    inputs_ = group_size(p_.in_sizes, group, p_.in) - input_;
    outputs_ = group_size(p_.out_sizes, group, p_.out) - output_;
    rows_ = inputs_ > 0 && outputs_ > 0 ? GroupRows::of(p_.offsets, p_.rows, group) : GroupRows();
    Product product;
    product.clear();
    for (int i = 0; i < kStages - 1; ++i) load(i, i);
    const int64_t steps = (rows_.count() + Shape::kDepth - 1) / Shape::kDepth;
    int stage = 0;
    for (int64_t step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncthreads();  // the step is there, and the one before has been read
      load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      char* const x = shared_ + stage * Shape::kStageBytes;
      product.add(x, x + Shape::kTileBytes, inputs_);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    write(product, group);
    __syncthreads();  // all stages are the next tile's
  }

 private:
  __device__ void load(int64_t step, int stage) const {
    const int64_t first = rows_.begin + step * Shape::kDepth;
    if (first < rows_.end) {
      char* const to = shared_ + stage * Shape::kStageBytes;
      load_lines(to, p_.x, p_.x_row, first, input_, inputs_, a_.x_pieces);
      load_lines(to + Shape::kTileBytes, p_.dy, p_.dy_row, first, output_, outputs_, a_.dy_pieces);
    }
    copy_commit();
  }
  __device__ void load_lines(char* to, const char* from, int64_t stride, int64_t first, int feature, int count,
                             bool pieces) const {
    copy_all<Shape::kDepth * Shape::kLineChunks / kGroupedThreads>(pieces, [&](int j, auto copy) {
      const int i = threadIdx.x + j * kGroupedThreads, line = i / Shape::kLineChunks, chunk = i % Shape::kLineChunks;
      const T* const row = reinterpret_cast<const T*>(from) + (first + line) * stride + feature + chunk * kItems;
      copy(to + Shape::RowPlace::offset(line, chunk), row, first + line < rows_.end ? count - chunk * kItems : 0);
    });
  }

  // What the group does not have is zero, whatever the others' sums are.
  __device__ void write(const Product& product, int64_t group) const {
    T* const to = reinterpret_cast<T*>(p_.dw) + group * p_.in * p_.out;
    EFFOPS_KEEP_LOOP
    for (int part = 0; part < Product::kParts; ++part) {
      product.put(part, corner_, kCornerStride);
      __syncwarp();
      EFFOPS_KEEP_LOOP
      for (int i = lane_index(); i < Product::kPartRows * (Product::kColumns / kItems); i += kWarp) {
        const int row = Product::row_of(part) + i / (Product::kColumns / kItems);
        const int at = i % (Product::kColumns / kItems) * kItems, column = Product::first_column() + at;
        const int64_t left = p_.out - output_ - column;
        if (input_ + row >= p_.in || left <= 0) continue;
        const float* const sums = corner_ + i / (Product::kColumns / kItems) * kCornerStride + at;
        Items<T, kItems> items;
        EFFOPS_UNROLL
        for (int e = 0; e < kItems; ++e)
          items.item[e] = row < inputs_ && column + e < outputs_ ? narrow<T>(sums[e]) : T{};
        items.store_some(to + int64_t(input_ + row) * p_.out + output_ + column, left, a_.dw_pieces);
      }
      __syncwarp();  // the corner is the next part's
    }
  }

  const GradientParams& a_;
  const GroupedGradientProblem& p_;
  char* shared_;
  float* corner_;
  GroupRows rows_;
  int input_ = 0, output_ = 0;    // the tile's first ones
  int inputs_ = 0, outputs_ = 0;  // how many the group has from there
};

template <class T>
__global__ void __launch_bounds__(kGroupedThreads) grouped_gradient_tiles(const __grid_constant__ GradientParams a) {
  GradientTiles<T> tiles(a, shared_memory());
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) tiles.run(tile);
}

}  // namespace effops::device
