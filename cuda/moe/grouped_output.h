// Sums of products to features of y: scale, bias, activation of pairs. A warp's sums go through a corner of shared
// memory, so that the arithmetic stands in a loop and rows are written in 16-byte pieces.
#pragma once

#include "moe/activation.h"
#include "moe/grouped_shape.h"

namespace effops::device {

template <class Shape, class Product>
class GroupedOutput {
  using T = typename Shape::Element;
  static constexpr int kCount = kItems16<T>, kColumns = Product::kColumns;
  static constexpr int kStride = kColumns + 8;  // floats: the rows that half a warp stores to fall on different banks

 public:
  static constexpr int kBytes = kGroupedThreads / kWarp * Product::kPartRows * kStride * 4;

  __device__ GroupedOutput(const GroupedParams& a, char* shared)
      : a_(a), corner_(reinterpret_cast<float*>(shared) + warp_index() * Product::kPartRows * kStride) {}

  __device__ void write(const GroupTile& tile, const Product& product) const {
    EFFOPS_KEEP_LOOP
    for (int part = 0; part < Product::kParts; ++part) {
      const int row = Product::row_of(part);
      if (row >= tile.rows) break;  // of the whole warp; later parts are further down
      product.put(part, corner_, kStride);
      __syncwarp();
      write_part(tile, row);
      __syncwarp();  // the corner is the next part's
    }
  }

  // Rows from `first`, the last group's end, on.
  __device__ void clear(int64_t first) const {
    const GroupedProblem& p = a_.p;
    for (int64_t row = first + blockIdx.x; row < p.rows; row += gridDim.x)
      for (int64_t c = threadIdx.x * kCount; c < p.features(); c += kGroupedThreads * kCount)
        Items<T, kCount>{}.store_some(y_at(row, c), p.features() - c, a_.y_pieces);
  }

 private:
  __device__ T* y_at(int64_t row, int64_t feature) const {
    return reinterpret_cast<T*>(a_.p.y) + row * a_.p.y_row + feature;
  }

  __device__ void write_part(const GroupTile& tile, int first_row) const {
    const bool paired = a_.pairing != Pairing::none;
    const int own = paired ? kColumns / 2 : kColumns;  // features of this warp
    const int before = paired ? Product::first_column() / 2 : Product::first_column();
    const int64_t features = a_.p.features();
    EFFOPS_KEEP_LOOP
    for (int i = lane_index(); i < Product::kPartRows * (own / kCount); i += kWarp) {
      const int row = i / (own / kCount), at = i % (own / kCount) * kCount;
      const int feature = tile.feature + before + at;
      if (first_row + row >= tile.rows || feature >= features) continue;
      const float* const sums = corner_ + row * kStride;
      float g[kCount], u[kCount];
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e) {
        const int gate = a_.pairing == Pairing::none     ? at + e
                         : a_.pairing == Pairing::blocks ? column_of(0, at + e)
                                                         : 2 * (at + e);
        g[e] = sums[gate];
        u[e] = paired ? sums[gate + (a_.pairing == Pairing::blocks ? kBlock : 1)] : 1;
      }
      finish(g, tile, 0, feature);
      if (paired) finish(u, tile, 1, feature);
      activate(a_.p.activation, g, u);
      Items<T, kCount> items;
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e) items.item[e] = paired || feature + e < tile.limit ? narrow<T>(g[e]) : T{};
      items.store_some(y_at(tile.row + first_row + row, feature), features - feature, a_.y_pieces);
    }
  }

  // Scale and bias of the gate or up values of features from `y` on.
  __device__ void finish(float (&x)[kCount], const GroupTile& tile, int half, int y) const {
    const GroupedProblem& p = a_.p;
    if (p.scale == nullptr && p.bias == nullptr) return;
    const bool paired = a_.pairing != Pairing::none;
    const int first = paired ? static_cast<int>(paired_feature(p, half, y)) : y, step = paired && p.interleaved ? 2 : 1;
    const int count = (paired ? static_cast<int>(p.features()) : tile.limit) - y;
    const int64_t at = tile.group * p.out + first;
    if (p.scale != nullptr) {
      const float* const scale = p.scale + at;
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e)
        if (e < count) x[e] *= scale[e * step];
    }
    if (p.bias != nullptr) {
      const T* const bias = reinterpret_cast<const T*>(p.bias) + at;
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e)
        if (e < count) x[e] += widen(bias[e * step]);
    }
  }

  const GroupedParams& a_;
  float* corner_;
};

}  // namespace effops::device
