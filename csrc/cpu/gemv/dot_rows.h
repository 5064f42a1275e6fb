// Inner products of many long-lived rows (keys, weights) with a few vectors, at memory speed.
#pragma once

#include "cpu/simd/prefetch.h"
#include "cpu/simd/product.h"

namespace effops::cpu::EFFOPS_ISA {

// Rows are taken W / MR at a time, so that one reduction fills a vector: result [row][MR].
template <class V, int MR>
inline constexpr int kDotRows = V::width / MR;

// Where a chunk of vector m lies: [chunk][MR][kChunk], or each vector on its own.
template <class P, int MR>
struct InterleavedQuery {
  const typename P::Element* x;
  const typename P::Element* operator()(int64_t at, int m) const { return x + at * MR + m * P::kChunk; }
};
template <class P>
struct RowQuery {
  const typename P::Element* x;
  int64_t row;
  const typename P::Element* operator()(int64_t at, int m) const { return x + m * row + at; }
};

// Products of rows [0, kDotRows) at row[i], `dim` elements of type W each, with MR vectors in P::Element that are zero
// beyond dim, up to a whole chunk: done(sums [row][MR], whose lanes are still to be added), which began as first(i).
template <class P, class W, int MR, class A, class X, class First, class Done, class V = vec_of<typename P::C>>
inline auto sum_dot_rows(const W* const (&row)[kDotRows<V, MR>], int64_t dim, const A& ahead, const X& x, First&& first,
                         Done&& done) {
  constexpr int NK = kDotRows<V, MR>, kChunk = P::kChunk;
  V acc[V::width];
#pragma GCC unroll 16
  for (int i = 0; i < V::width; ++i) acc[i] = first(i);
  auto step = [&](int64_t at, auto load) {
    if constexpr (NK < MR) {
      typename P::Chunk r[NK];
#pragma GCC unroll 16
      for (int i = 0; i < NK; ++i) r[i] = load(i, at);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const auto y = P::load_query(x(at, m));
#pragma GCC unroll 16
        for (int i = 0; i < NK; ++i) acc[i * MR + m] = P::dot(acc[i * MR + m], r[i], y);
      }
    } else {
      typename P::Chunk y[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) y[m] = P::load_query(x(at, m));
#pragma GCC unroll 16
      for (int i = 0; i < NK; ++i) {
        const auto r = load(i, at);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) acc[i * MR + m] = P::dot(acc[i * MR + m], r, y[m]);
      }
    }
  };
  int64_t at = 0;
  for (; at + kChunk <= dim; at += kChunk)
    step(at, [&](int i, int64_t from) {
      ahead(row[0], i, from, kChunk);
      return P::load(row[i] + from);
    });
  if (at < dim)
    step(at, [&](int i, int64_t from) {
      ahead(row[0], i, from, dim - from);
      return P::load_n(row[i] + from, static_cast<int>(dim - from));
    });
  return done(acc);
}

// The inner products of rows and vectors, as above.
template <class P, class W, int MR, class A, class X, class V = vec_of<typename P::C>>
inline V dot_rows(const W* const (&row)[kDotRows<V, MR>], int64_t dim, const A& ahead, const X& x) {
  return sum_dot_rows<P, W, MR>(
      row, dim, ahead, x, [](int) { return V::zero(); }, [](V(&sums)[V::width]) { return V::reduce_add_each(sums); });
}

// The same added to sums that go on.
template <class P, class W, int MR, class A, class X, class V = vec_of<typename P::C>>
inline void add_dot_rows(const W* const (&row)[kDotRows<V, MR>], int64_t dim, const A& ahead, const X& x,
                         V (&sums)[V::width]) {
  sum_dot_rows<P, W, MR>(
      row, dim, ahead, x, [&](int i) { return sums[i]; },
      [&](V(&end)[V::width]) {
#pragma GCC unroll 16
        for (int i = 0; i < V::width; ++i) sums[i] = end[i];
      });
}

// MR results of dot_rows, [part][row][MR], to one vector of all rows for each m.
template <int MR, class V>
inline void rows_apart(V (&y)[MR]) {
#if defined(EFFOPS_ISA_AVX512)
  if constexpr (V::width == 16 && MR == 4) return V::transpose_4_4(y);
  if constexpr (V::width == 16 && MR == 8) return V::transpose_2_8(y);
#endif
  if constexpr (MR > 1) {
    typename V::scalar from[V::width * MR], to[V::width];
    for (int part = 0; part < MR; ++part) y[part].store(from + part * V::width);
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < V::width; ++i) to[i] = from[i * MR + m];
      y[m] = V::load(to);
    }
  }
}

// A vector in the layout dot_rows reads: vector m of MR, chunk by chunk.
template <class P, class T, int MR>
void place_query(const T* from, int64_t stride, int64_t dim, int m, typename P::Element* x) {
  constexpr int kChunk = P::kChunk;
  for (int64_t at = 0; at < dim; at += kChunk) {
    typename P::Element* to = x + at * MR + m * kChunk;
    const int64_t n = dim - at < kChunk ? dim - at : int64_t(kChunk);
    if (stride == 1 && n == kChunk) {
      P::place(from + at, to);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) to[i] = P::element(from[(at + i) * stride]);
    for (int64_t i = n; i < kChunk; ++i) to[i] = P::element(T{});
  }
}

// Vector m the same as the one before it.
template <class P, int MR>
void repeat_query(int m, int64_t dim, typename P::Element* x) {
  constexpr int kChunk = P::kChunk;
  for (int64_t at = 0; at < dim; at += kChunk)
    std::copy_n(x + at * MR + (m - 1) * kChunk, kChunk, x + at * MR + m * kChunk);
}

}  // namespace effops::cpu::EFFOPS_ISA
