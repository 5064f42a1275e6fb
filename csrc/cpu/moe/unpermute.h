// Rows in expert order back to tokens: a weighted sum of each token's rows, choices in order.
#pragma once

#include "common/moe_problem.h"
#include "cpu/layer/layer.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
void unpermute_typed(const UnpermuteProblem& p, const Parallel& parallel) {
  using V = vec_of<T>;
  using C = typename V::scalar;
  constexpr int kWide = 4 * V::width;  // four sums that do not wait for each other
  for_rows(parallel, p.tokens, p.dim * p.k, [&](int64_t t) {
    const int32_t* places = p.inverse + t * p.k;
    const C* weights = p.weights ? reinterpret_cast<const C*>(p.weights) + t * p.k : nullptr;
    const T* y = reinterpret_cast<const T*>(p.y);
    T* out = reinterpret_cast<T*>(p.out) + t * p.dim;
    auto for_choices = [&](auto&& body) {
      for (int64_t j = 0; j < p.k; ++j)
        if (places[j] >= 0) body(V::set1(weights ? weights[j] : C(1)), y + places[j] * p.y_row);
    };
    int64_t d = 0;
    for (; d + kWide <= p.dim; d += kWide) {
      V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for_choices([&](V weight, const T* row) {
        for (int i = 0; i < 4; ++i) sums[i] = fmadd(weight, V::load(row + d + i * V::width), sums[i]);
      });
      for (int i = 0; i < 4; ++i) sums[i].store(out + d + i * V::width);
    }
    for (; d < p.dim; d += V::width) {
      const int n = static_cast<int>(std::min<int64_t>(V::width, p.dim - d));
      V sum = V::zero();
      for_choices([&](V weight, const T* row) { sum = fmadd(weight, load_some<V>(row + d, n), sum); });
      store_n(sum, out + d, n);
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
