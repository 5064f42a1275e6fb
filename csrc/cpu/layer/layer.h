// Element-wise steps of a decoder layer: RMS norm, rotary embedding, gated activation, merging of
// partial attention results.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/layer_problem.h"
#include "common/parallel.h"
#include "cpu/simd/math.h"

namespace effops::cpu::EFFOPS_ISA {

// Runs body(row) over all rows, in pieces worth a task.
template <class F>
void for_rows(const Parallel& parallel, int64_t rows, int64_t elements_a_row, F&& body) {
  const int64_t piece = std::max<int64_t>(1, kLayerSerial / 4 / std::max<int64_t>(1, elements_a_row));
  parallel.for_each((rows + piece - 1) / piece, rows * elements_a_row > kLayerSerial, [&](int64_t i) {
    for (int64_t r = i * piece; r < std::min(rows, (i + 1) * piece); ++r) body(r);
  });
}

// Vectors of n <= width elements: whole ones, and the tail of a row.
template <class V, class T>
inline void store_n(V x, T* to, int n) {
  if (n == V::width) return x.store(to);
  T all[V::width];
  x.store(all);
  std::copy(all, all + n, to);
}
template <class V, class T>
inline V load_some(const T* from, int n) {
  return n == V::width ? V::load(from) : V::load_n(from, n);
}
template <class V, class F>
inline void for_vectors(int64_t count, F&& body) {
  for (int64_t d = 0; d < count; d += V::width) body(d, static_cast<int>(std::min<int64_t>(V::width, count - d)));
}

template <class T>
void rms_norm_typed(const RmsNormProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  using C = typename V::scalar;
  const T* weight = reinterpret_cast<const T*>(p.weight);
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    const T* x = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    T* y = reinterpret_cast<T*>(p.y) + row * p.dim;
    V sum = V::zero();
    for_vectors<V>(p.dim, [&](int64_t d, int n) {
      const V v = load_some<V>(x + d, n);
      sum = fmadd(v, v, sum);
    });
    const V factor = V::set1(C(1) / std::sqrt(reduce_add(sum) / C(p.dim) + C(p.eps)));
    const V offset = V::set1(C(p.weight_offset));
    for_vectors<V>(p.dim, [&](int64_t d, int n) {
      store_n(load_some<V>(x + d, n) * factor * (load_some<V>(weight + d, n) + offset), y + d, n);
    });
  });
}

template <class T>
void rotary_typed(const RotaryProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    const T* x = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    T* y = reinterpret_cast<T*>(p.y) + row * p.dim;
    const int64_t bt = row / p.rows.size[2];
    const int64_t position =
        p.positions[bt / p.rows.size[1] * p.positions_batch + bt % p.rows.size[1] * p.positions_token];
    const float *cos = p.cos + position * p.half, *sin = p.sin + position * p.half;
    for_vectors<V>(p.half, [&](int64_t d, int n) {
      const V a = load_some<V>(x + d, n), b = load_some<V>(x + p.half + d, n);
      const V c = load_some<V>(cos + d, n), s = load_some<V>(sin + d, n);
      store_n(a * c - b * s, y + d, n);
      store_n(b * c + a * s, y + p.half + d, n);
    });
    std::copy(x + 2 * p.half, x + p.dim, y + 2 * p.half);
  });
}

template <class T>
void silu_mul_typed(const SiluMulProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    const T* gate = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    const T* up = gate + p.dim;
    T* y = reinterpret_cast<T*>(p.y) + row * p.dim;
    for_vectors<V>(p.dim, [&](int64_t d, int n) {
      const V g = load_some<V>(gate + d, n);
      store_n(g * sigmoid(g) * load_some<V>(up + d, n), y + d, n);
    });
  });
}

template <class T>
void add_typed(const AddProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  const int64_t piece = kLayerSerial / 4;
  for_rows(parallel, (p.count + piece - 1) / piece, piece, [&](int64_t i) {
    T* y = reinterpret_cast<T*>(p.y) + i * piece;
    const T* x = reinterpret_cast<const T*>(p.x) + i * piece;
    for_vectors<V>(std::min(piece, p.count - i * piece),
                   [&](int64_t d, int n) { store_n(load_some<V>(y + d, n) + load_some<V>(x + d, n), y + d, n); });
  });
}

template <class T>
void merge_states_typed(const MergeProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  using C = typename V::scalar;
  const C kEmpty = -std::numeric_limits<C>::infinity();
  const C* lses = reinterpret_cast<const C*>(p.lses);
  const T* outs = reinterpret_cast<const T*>(p.outs);
  for_rows(parallel, p.rows, p.dim * p.parts, [&](int64_t row) {
    C top = kEmpty, total = 0;
    for (int64_t i = 0; i < p.parts; ++i) top = std::max(top, lses[i * p.rows + row]);
    for (int64_t i = 0; i < p.parts; ++i)
      if (lses[i * p.rows + row] > kEmpty) total += std::exp(lses[i * p.rows + row] - top);
    const C lse = top > kEmpty ? top + std::log(total) : kEmpty;
    reinterpret_cast<C*>(p.lse)[row] = lse;
    T* y = reinterpret_cast<T*>(p.out) + row * p.dim;
    for_vectors<V>(p.dim, [&](int64_t d, int n) {
      V sum = V::zero();
      for (int64_t i = 0; i < p.parts; ++i) {
        const C part = lses[i * p.rows + row];
        if (part > kEmpty)
          sum = fmadd(V::set1(std::exp(part - lse)), load_some<V>(outs + (i * p.rows + row) * p.dim + d, n), sum);
      }
      store_n(sum, y + d, n);
    });
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
