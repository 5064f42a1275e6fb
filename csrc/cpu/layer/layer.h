// Element-wise steps of a decoder layer: RMS norm, rotary embedding, gated activation, merging of
// partial attention results.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/layer_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
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

// y = x / rms(x) * (weight + offset), one row.
template <class T>
void rms_norm_row(const T* x, const T* weight, int64_t dim, double eps, double weight_offset, T* y) {
  using V = vec_of<T>;
  using C = typename V::scalar;
  V sum = V::zero();
  for_vectors<V>(dim, [&](int64_t d, int n) {
    const V v = load_some<V>(x + d, n);
    sum = fmadd(v, v, sum);
  });
  const V factor = V::set1(C(1) / std::sqrt(reduce_add(sum) / C(dim) + C(eps)));
  const V offset = V::set1(C(weight_offset));
  for_vectors<V>(dim, [&](int64_t d, int n) {
    store_n(load_some<V>(x + d, n) * factor * (load_some<V>(weight + d, n) + offset), y + d, n);
  });
}

template <class T>
void rms_norm_typed(const RmsNormProblem& p, const Parallel& parallel) {
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    rms_norm_row(reinterpret_cast<const T*>(p.x) + p.rows.offset(row), reinterpret_cast<const T*>(p.weight), p.dim,
                 p.eps, p.weight_offset, reinterpret_cast<T*>(p.y) + row * p.dim);
  });
}

// One head turned by the angles of one position.
template <class T>
void rotary_row(const T* x, const float* cos, const float* sin, int64_t half, int64_t dim, T* y) {
  using V = vec_of<T>;
  for_vectors<V>(half, [&](int64_t d, int n) {
    const V a = load_some<V>(x + d, n), b = load_some<V>(x + half + d, n);
    const V c = load_some<V>(cos + d, n), s = load_some<V>(sin + d, n);
    store_n(a * c - b * s, y + d, n);
    store_n(b * c + a * s, y + half + d, n);
  });
  std::copy(x + 2 * half, x + dim, y + 2 * half);
}

template <class T>
void rotary_typed(const RotaryProblem& p, const Parallel& parallel) {
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    const int64_t bt = row / p.rows.size[2];
    const int64_t at = p.angles.of(bt / p.rows.size[1], bt % p.rows.size[1]);
    rotary_row(reinterpret_cast<const T*>(p.x) + p.rows.offset(row), p.angles.cos + at, p.angles.sin + at,
               p.angles.half, p.dim, reinterpret_cast<T*>(p.y) + row * p.dim);
  });
}

// A task is one head of one sequence, whose tokens go in order: of two that name one slot the later
// one stays.
template <class T>
void rotary_append_typed(const RotaryAppendProblem& p, const Parallel& parallel) {
  const int64_t heads = p.heads + 2 * p.kv_heads;
  parallel.for_each(p.batch * heads, p.batch * heads * p.tokens * p.dim > kLayerSerial, [&](int64_t task) {
    const int64_t b = task / heads, h = task % heads, kv = h - p.heads;
    const bool value = kv >= p.kv_heads;
    const TensorView4& cache = value ? p.v : p.k;
    T* const apart = static_cast<T*>(thread_scratch(Scratch::task, p.dim * sizeof(T)));
    for (int64_t t = 0; t < p.tokens; ++t) {
      const T* x = reinterpret_cast<const T*>(p.x) + b * p.x_batch + t * p.x_token + h * p.x_head;
      const int64_t at = p.angles.of(b, t), slot = p.slots.of(b, t);
      auto write = [&](T* y) {
        if (value) {
          std::copy(x, x + p.dim, y);
        } else {
          rotary_row(x, p.angles.cos + at, p.angles.sin + at, p.angles.half, p.dim, y);
        }
      };
      if (kv < 0) {
        write(reinterpret_cast<T*>(p.q) + ((b * p.tokens + t) * p.heads + h) * p.dim);
      } else if (slot >= 0) {
        T* y = reinterpret_cast<T*>(cache.data) + cache_offset(cache, p.pages, b, kv % p.kv_heads, slot);
        write(cache.dim == 1 ? y : apart);
        for (int64_t d = 0; cache.dim != 1 && d < p.dim; ++d) y[d * cache.dim] = apart[d];
      }
    }
  });
}

// y = silu(gate) * up, one row.
template <class T>
void silu_mul_row(const T* gate, const T* up, int64_t dim, T* y) {
  using V = vec_of<T>;
  for_vectors<V>(dim, [&](int64_t d, int n) {
    const V g = load_some<V>(gate + d, n);
    store_n(g * sigmoid(g) * load_some<V>(up + d, n), y + d, n);
  });
}

template <class T>
void silu_mul_typed(const SiluMulProblem& p, const Parallel& parallel) {
  for_rows(parallel, p.rows.rows(), p.dim, [&](int64_t row) {
    const T* gate = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    silu_mul_row(gate, gate + p.dim, p.dim, reinterpret_cast<T*>(p.y) + row * p.dim);
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

template <class T, class O>
void merge_rows(const MergeProblem& p, const Parallel& parallel) {
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
    O* y = reinterpret_cast<O*>(p.out) + row * p.dim;
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

template <class T>
void merge_states_typed(const MergeProblem& p, const Parallel& parallel) {
  if constexpr (std::is_same_v<T, float>) {
    if (p.out_dtype == DType::bf16) return merge_rows<T, bf16>(p, parallel);
    if (p.out_dtype == DType::f16) return merge_rows<T, f16>(p, parallel);
  }
  merge_rows<T, T>(p, parallel);
}

}  // namespace effops::cpu::EFFOPS_ISA
