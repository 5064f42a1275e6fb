// Columns of a matrix as a panel of units [unit][32] (see panel.h), and rows as units.
#pragma once

#include "cpu/moe/panel.h"

namespace effops::cpu::EFFOPS_ISA {

// The columns of a tile: two runs of sixteen neighbours. Columns past a run's count repeat its last one.
struct TileColumns {
  static constexpr int kRun = kPanel / 2;
  int64_t first[2];
  int count[2];

  int64_t operator()(int j) const {
    const int run = count[1] > 0 ? j / kRun : 0;
    return first[run] + std::min(j % kRun, count[run] - 1);
  }
};

// From columns that are contiguous over the inner dimension: column j begins at w + columns(j) * stride.
template <class P, class W>
void pack_rows_of_columns(const W* w, int64_t stride, const TileColumns& columns, int64_t in, typename P::Unit* to) {
  using V = vec_of<typename P::C>;
  using C = typename P::C;
  constexpr int kWidth = V::width, kElements = kWidth * P::kPack;
  for (int j = 0; j < kPanel; j += kWidth) {
    const W* from[kWidth];
    for (int i = 0; i < kWidth; ++i) from[i] = w + columns(j + i) * stride;
    for (int64_t k = 0; k < in; k += kElements) {
      const int left = static_cast<int>(std::min<int64_t>(kElements, in - k));
      V block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if constexpr (P::kPack == 2) {
          const auto chunk = left == kElements ? P::load(from[i] + k) : P::load_n(from[i] + k, left);
          block[i] = P::load_units(reinterpret_cast<const typename P::Unit*>(&chunk.a));
        } else {
          block[i] = left == kElements ? V::load(from[i] + k) : V::load_n(from[i] + k, left);
        }
        prefetch(from[i] + k + 8 * kElements);
      }
      V::transpose(block);
      const int units = (left + P::kPack - 1) / P::kPack;
      for (int i = 0; i < units; ++i) block[i].store(reinterpret_cast<C*>(to + (k / P::kPack + i) * kPanel + j));
    }
  }
}

// From columns that lie side by side: element (k, column) at w + k * stride + column.
template <class P, class W>
void pack_columns(const W* w, int64_t stride, const TileColumns& columns, int64_t in, typename P::Unit* to) {
  using V = vec_of<typename P::C>;
  using C = typename P::C;
  for (int64_t k = 0; k < in; k += P::kPack, to += kPanel) {
    for (int run = 0; run < 2; ++run)
      for (int j = 0; j < TileColumns::kRun; j += V::width) {
        const int count = std::clamp(columns.count[run] - j, 0, V::width);
        const W* from = w + k * stride + columns.first[run] + (count > 0 ? j : 0);
        auto row = [&](const W* at) { return count == V::width ? V::load(at) : V::load_n(at, count); };
        const V low = row(from);
        const V high = P::kPack == 2 && k + 1 < in ? row(from + stride) : V::zero();
        P::pair(low, high).store(reinterpret_cast<C*>(to + run * TileColumns::kRun + j));
      }
  }
}

// `in` elements of a row as P sees them, and zeros up to `padded`.
template <class P, class T>
void place_row(const T* from, int64_t in, int64_t padded, typename P::Element* to) {
  int64_t at = 0;
  for (; at + P::kChunk <= in; at += P::kChunk) P::place(from + at, to + at);
  for (; at < in; ++at) to[at] = P::element(from[at]);
  std::fill(to + in, to + padded, P::element(T{}));
}

}  // namespace effops::cpu::EFFOPS_ISA
