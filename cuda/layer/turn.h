// One head turned by the angles of one position, in pieces that lanes share.
#pragma once

#include "common/layer_problem.h"
#include "primitives/element.h"

namespace effops::device {

// Of `dim` elements the pairs (i, i + half) turn and the rest stays; null angles: all stay.
template <class T, int kCount>
struct Turn {
  using C = Compute<T>;
  using Own = Items<T, kCount>;

  int64_t half, dim;
  const float *cos = nullptr, *sin = nullptr;

  __device__ Turn(const Angles& angles, int64_t dim_, int64_t b, int64_t t) : half(angles.half), dim(dim_) {
    const int64_t position = angles.positions.of(b, t);
    if (position < 0 || position >= angles.rows) return;
    cos = angles.cos + position * half;
    sin = angles.sin + position * half;
  }
  __device__ static int64_t pieces(int64_t half, int64_t dim) { return (dim - half) / kCount; }

  // Steps of `stride` elements from one to the next of y.
  __device__ void piece(int64_t i, const T* x, T* y, int64_t stride) const {
    const int64_t d = i * kCount;
    if (d >= half) return put(Own::load(x + half + d), y, half + d, stride);
    Own a = Own::load(x + d), b = Own::load(x + half + d);
    EFFOPS_UNROLL
    for (int e = 0; cos != nullptr && e < kCount; ++e) {
      const C c = cos[d + e], s = sin[d + e], low = widen(a.item[e]), high = widen(b.item[e]);
      a.item[e] = narrow<T>(low * c - high * s);
      b.item[e] = narrow<T>(high * c + low * s);
    }
    put(a, y, d, stride);
    put(b, y, half + d, stride);
  }

  __device__ static void put(const Own& items, T* y, int64_t d, int64_t stride) {
    if (kCount > 1 || stride == 1) return items.store(y + d);
    y[d * stride] = items.item[0];
  }
};

// Can heads be turned 16 bytes at a time?
template <class T>
bool turns_in_pieces(const Angles& angles, int64_t dim) {
  return in_pieces(nullptr, sizeof(T), {angles.half, dim});
}

}  // namespace effops::device
