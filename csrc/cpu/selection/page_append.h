// Widens the bounds of pages by new keys. Floor: the keys are read once; of each token's page the bounds are read and
// written, in the first-level cache while tokens go in order.
#pragma once

#include "common/page_bounds.h"
#include "common/parallel.h"
#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
struct PageBound {
  T *low, *high;
  int64_t low_step, high_step;

  void set(const T* key, int64_t step, int64_t dim) const {
    for (int64_t c = 0; c < dim; ++c) low[c * low_step] = high[c * high_step] = key[c * step];
  }
  void widen(const T* key, int64_t step, int64_t dim) const {
    using V = vec_of<T>;
    int64_t c = 0;
    if (step == 1 && low_step == 1 && high_step == 1) {
      for (; c + V::width <= dim; c += V::width) {
        const V x = V::load(key + c);
        min(x, V::load(low + c)).store(low + c);
        max(x, V::load(high + c)).store(high + c);
      }
    }
    for (; c < dim; ++c) {
      const T x = key[c * step];
      if (to_float(x) < to_float(low[c * low_step])) low[c * low_step] = x;
      if (to_float(x) > to_float(high[c * high_step])) high[c * high_step] = x;
    }
  }
};

template <class T>
void page_append_typed(const PageAppendProblem& p, const Parallel& parallel) {
  // Tokens go in order: the first of a page begins it anew.
  parallel.for_each(p.batch * p.heads, p.tokens > 64, [&](int64_t i) {
    const int64_t b = i / p.heads, g = i % p.heads;
    const auto of = [&](const TensorView4& x, int64_t token) {
      return reinterpret_cast<T*>(x.data) + b * x.batch + token * x.token + g * x.head;
    };
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t slot = p.slots.of(b, t);
      if (slot < 0) continue;
      const PageBound<T> bound{of(p.low, slot / p.page), of(p.high, slot / p.page), p.low.dim, p.high.dim};
      const T* const key = of(p.keys, t);
      slot % p.page == 0 ? bound.set(key, p.keys.dim, p.dim) : bound.widen(key, p.keys.dim, p.dim);
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
