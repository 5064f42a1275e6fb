// What happens to a row of a linear layer before the product, and to its results.
#pragma once

#include "common/linear_problem.h"
#include "cpu/layer/layer.h"

namespace effops::cpu::EFFOPS_ISA {

// Row i of f(x), in place where f is nothing. `row` has room for one.
template <class T>
const T* prepared_row(const LinearProblem& p, int64_t i, T* row) {
  const T* x = reinterpret_cast<const T*>(p.x) + i * p.x_row;
  if (p.norm == nullptr && !p.gated) return x;
  if (p.gated) silu_mul_row(x, x + p.in, p.in, row);
  if (p.norm != nullptr) rms_norm_row(x, reinterpret_cast<const T*>(p.norm), p.in, p.norm_eps, 0, row);
  return row;
}

// Features [n, n + count) of a row.
template <class T, class V = vec_of<T>>
void finish_features(const LinearProblem& p, int64_t row, int64_t n, int count, V y) {
  T* const to = reinterpret_cast<T*>(p.y) + row * p.y_row + n;
  if (p.bias != nullptr) y = y + load_some<V>(reinterpret_cast<const T*>(p.bias) + n, count);
  if (p.silu) y = y * sigmoid(y);
  if (p.residual != nullptr)
    y = y + load_some<V>(reinterpret_cast<const T*>(p.residual) + row * p.residual_row + n, count);
  store_n(y, to, count);
}

}  // namespace effops::cpu::EFFOPS_ISA
