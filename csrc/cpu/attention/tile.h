// How a tile of keys or values is loaded: in place when its rows are contiguous, else through a
// copy. Never reads past a row's end or a sequence's.
#pragma once

#include "common/attention_problem.h"
#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
struct Tile {
  const T* data;
  int64_t stride;  // elements between rows
  int64_t keys;
};

template <class T>
class TileSource {
 public:
  // `stage` holds kTileKeys rows of `dim` elements; unused when rows are contiguous.
  TileSource(const TensorView4& view, int64_t batch, int64_t first_token, int64_t head, int64_t dim, T* stage)
      : base_(reinterpret_cast<const T*>(view.data) + batch * view.batch + first_token * view.token + head * view.head),
        token_(view.token),
        dim_stride_(view.dim),
        dim_(dim),
        stage_(stage) {}

  Tile<T> load(int64_t first, int64_t keys) const {
    const T* from = base_ + first * token_;
    if (dim_stride_ == 1) return {from, token_, keys};
    for (int64_t j = 0; j < keys; ++j) copy_row(from + j * token_, dim_stride_, dim_, stage_ + j * dim_);
    return {stage_, dim_, keys};
  }

 private:
  const T* base_;
  int64_t token_, dim_stride_, dim_;
  T* stage_;
};

}  // namespace effops::cpu::EFFOPS_ISA
