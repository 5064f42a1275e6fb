// Units at memory banks, emulated: a thread stands for a channel. Products, sums and roundings are those of
// common/pim_problem.h in every instruction set, so that results have the same bits everywhere.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/pim_problem.h"
#include "cpu/simd/convert.h"

namespace effops::cpu::EFFOPS_ISA {

// Adds the first `count` of n products, which it overwrites: neighbours, then neighbours of their sums.
template <class C>
C tree_sum(C* products, int64_t n) {
  for (int64_t width = n / 2; width >= 1; width /= 2)
    for (int64_t i = 0; i < width; ++i) products[i] = products[2 * i] + products[2 * i + 1];
  return products[0];
}

template <class T>
void pim_gemv_typed(const PimGemvProblem& p, const Parallel& parallel) {
  using C = decltype(to_float(T()));
  const bool worth_threads = p.batch * p.rows * p.out * p.in > 1 << 15;
  parallel.for_each(std::min(p.channels, p.tiles), worth_threads, [&](int64_t channel) {
    C products[PimGemvProblem::kMostLanes];
    std::vector<C> x(static_cast<size_t>(p.in)), row(x.size());
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t in = p.in_len(b), out = p.out_len(b);
      for (int64_t m = 0; m < p.rows; ++m) {
        const T* const vector = reinterpret_cast<const T*>(p.x) + b * p.x_batch + m * p.x_row;
        for (int64_t k = 0; k < in; ++k) x[k] = to_float(vector[k * p.x_value]);
        for (int64_t tile = channel; tile < p.tiles; tile += p.channels)
          for (int64_t n = tile * p.units; n < std::min(p.out, (tile + 1) * p.units); ++n) {
            C* const results = reinterpret_cast<C*>(p.results) + ((b * p.rows + m) * p.out + n) * p.sums;
            const int64_t there = n < out ? in : 0;
            const T* const bank = reinterpret_cast<const T*>(p.banks) + p.row_at(b, n);
            for (int64_t from = 0; from < there; from += p.row_values) {  // the row of the bank
              const T* const chunk = bank + p.value_at(from);
              const int64_t count = std::min(p.row_values, there - from);
              for (int64_t j = 0; j < count; ++j) row[from + j] = to_float(chunk[j * p.bank_value]);
            }
            for (int64_t s = 0; s < p.sums; ++s) {
              C sum = 0;
              const int64_t end = std::min((s + 1) * p.sum_values, there);
              for (int64_t k = s * p.sum_values; k < end; k += p.lanes) {
                for (int64_t i = 0; i < p.lanes; ++i) products[i] = i < end - k ? x[k + i] * row[k + i] : C(0);
                sum += tree_sum(products, p.lanes);
              }
              if constexpr (sizeof(T) == 2)
                if (p.narrow) sum = to_float(from_float<T>(sum));
              results[s] = sum;
            }
          }
      }
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
