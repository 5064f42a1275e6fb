// The stream of a block's tiles into shared memory, step by step of depth: ahead of the products, across the ends of
// tiles.
#pragma once

#include "moe/copy_chunk.h"
#include "moe/grouped_shape.h"
#include "primitives/int8.h"

namespace effops::device {

template <class Shape>
class GroupedLoad {
  using T = typename Shape::Element;
  using U = typename Shape::Weight;

 public:
  __device__ GroupedLoad(const GroupedParams& a, char* shared) : a_(a), shared_(shared), walk_(a) {}

  // The next step of depth, if there is one.
  __device__ void load(int stage) {
    while (!finished_ && done_ >= tile_.depth) begin_tile();
    if (finished_) return;
    load_rows(Shape::rows(shared_, stage));
    load_weights(Shape::raw(shared_, stage));
    done_ += Shape::kDepth;
  }

  // The bytes of w that this very thread copied become elements.
  __device__ static void convert(char* to, const char* from, Pairing pairing) {
    EFFOPS_UNROLL
    for (int j = 0; j < Shape::kOwnWeights; ++j) {
      const int i = threadIdx.x + j * kGroupedThreads, line = i / Shape::kLineChunks, chunk = i % Shape::kLineChunks;
      Vector16 parts[sizeof(T)];
      widen_int8<T>(parts, load16(from + i * 16));
      EFFOPS_UNROLL
      for (int part = 0; part < static_cast<int>(sizeof(T)); ++part)
        store16(to + Shape::WeightPlace::offset(line, place_of(chunk, part, pairing)), parts[part]);
    }
  }

 private:
  // Where a part of a line's chunk lies among the line's chunks of T.
  __device__ static int place_of(int chunk, int part, Pairing pairing) {
    const int item = part * Shape::kItems;
    if (Shape::kInputsAdjacent || pairing != Pairing::blocks) return (chunk * Shape::kRawItems + item) / Shape::kItems;
    return column_of(chunk % 2, chunk / 2 * Shape::kRawItems + item) / Shape::kItems;
  }

  __device__ void begin_tile() {
    finished_ = !walk_.next(tile_);
    done_ = 0;
    if (finished_ || tile_.depth == 0) return;
    EFFOPS_UNROLL
    for (int j = 0; j < Shape::kOwnRows; ++j) source_[j] = source_of(own_row(j));
    const int line = threadIdx.x / Shape::kLineChunks, first = threadIdx.x % Shape::kLineChunks * Shape::kRawItems;
    weights_ = reinterpret_cast<const U*>(a_.p.w) + tile_.group * a_.p.w_group;
    if constexpr (Shape::kInputsAdjacent) {
      weights_ += column_feature(line, left_) * a_.p.w_out + first;
    } else {
      weights_ += line * a_.p.w_in + column_feature(first_column(threadIdx.x % Shape::kLineChunks), left_);
    }
  }

  // The feature of a column of the tile, and how many columns of its kind there are from there on.
  __device__ int64_t column_feature(int column, int& left) const {
    if (a_.pairing == Pairing::blocks) {
      int half, own;
      half_of(column, half, own);
      left = static_cast<int>(a_.p.features()) - (tile_.feature + own);
      return paired_feature(a_.p, half, tile_.feature + own);
    }
    const int feature = (a_.pairing == Pairing::adjacent ? 2 : 1) * tile_.feature + column;
    left = tile_.limit - feature;
    return feature;
  }
  // Of a chunk of a line of inputs.
  __device__ int first_column(int chunk) const { return place_of(chunk, 0, a_.pairing) * Shape::kItems; }

  __device__ static int own_row(int j) {
    return threadIdx.x / Shape::kRowChunks + j * (kGroupedThreads / Shape::kRowChunks);
  }
  // Of x; negative: absent.
  __device__ int source_of(int row) const {
    if (row >= tile_.rows) return -1;
    row += tile_.row;
    if (a_.p.order == nullptr) return row;
    const int slot = a_.p.order[row];
    return slot < 0 || slot >= a_.p.rows ? -1 : static_cast<int>(a_.k.quotient(slot));
  }

  __device__ void load_rows(char* to) const {
    const int chunk = threadIdx.x % Shape::kRowChunks, first = done_ + chunk * Shape::kItems;
    copy_all<Shape::kOwnRows>(a_.x_pieces, [&](int j, auto copy) {
      int row;
      if constexpr (copy.kPieces) row = source_[j];  // registers have no index: only where the loop is unrolled
      else row = source_of(own_row(j));
      copy(to + Shape::RowPlace::offset(own_row(j), chunk),
           reinterpret_cast<const T*>(a_.p.x) + max_of(row, 0) * a_.p.x_row + first, row < 0 ? 0 : tile_.depth - first);
    });
  }

  // Chunks of bytes lie as they come until they are converted.
  __device__ void load_weights(char* to) {
    const int chunk = threadIdx.x % Shape::kLineChunks;
    copy_all<Shape::kOwnWeights>(a_.w_pieces, [&](int j, auto copy) {
      constexpr int kStep = kGroupedThreads / Shape::kLineChunks;  // lines
      const int line = threadIdx.x / Shape::kLineChunks + j * kStep;
      int place, count;
      const U* from;
      if constexpr (Shape::kInputsAdjacent) {  // lines are columns, of which two blocks are a step in gates or ups
        static_assert(kStep % (2 * kBlock) == 0, "a thread's columns are all gates or all ups");
        const int features = a_.pairing == Pairing::blocks ? kStep / 2 : kStep;
        const int apart = a_.pairing == Pairing::blocks && a_.p.interleaved ? kStep : features;
        place = chunk;
        from = weights_ + j * apart * a_.p.w_out;
        count = j * features < left_ ? tile_.depth - done_ - chunk * Shape::kRawItems : 0;
      } else {  // lines are inputs
        place = place_of(chunk, 0, a_.pairing);
        from = weights_ + j * kStep * a_.p.w_in;
        count = done_ + line < tile_.depth ? left_ : 0;
      }
      const int i = threadIdx.x + j * kGroupedThreads;
      copy(to + (Shape::kBytes ? i * 16 : Shape::WeightPlace::offset(line, place)), from, count);
    });
    weights_ += Shape::kInputsAdjacent ? Shape::kDepth : Shape::kDepth * a_.p.w_in;
  }

  const GroupedParams& a_;
  char* shared_;
  GroupedWalk<Shape::kRows, Shape::kColumns> walk_;
  GroupTile tile_;  // a tile of no depth before the first
  int done_ = 0;    // depth of the tile that has been loaded
  bool finished_ = false;
  // This thread's rows of x, and its first chunk of w, with the columns or items from there on.
  int source_[Shape::kOwnRows];
  const U* weights_ = nullptr;
  int left_ = 0;
};

}  // namespace effops::device
