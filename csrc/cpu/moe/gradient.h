// The gradient of a group's matrix: its rows are what is summed over.
#pragma once

#include "cpu/moe/grouped.h"

namespace effops::cpu::EFFOPS_ISA {

// dw [in, out] of each group = x^T dy. x is turned once, so that an input's values at all rows are a row of units; dy's
// columns become panels.
template <class T>
void grouped_gradient_typed(const GroupedGradientProblem& p, const Parallel& parallel) {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  using E = typename P::Element;
  T* const dw = reinterpret_cast<T*>(p.dw);
  const T *const x = reinterpret_cast<const T*>(p.x), *const dy = reinterpret_cast<const T*>(p.dy);
  const int64_t tiles = (p.out + kPanel - 1) / kPanel;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t first = g == 0 ? 0 : p.offsets[g - 1], rows = p.offsets[g] - first;
    const int64_t in = p.in_sizes != nullptr ? p.in_sizes[g] : p.in;
    const int64_t out = p.out_sizes != nullptr ? p.out_sizes[g] : p.out;
    T* const to = dw + g * p.in * p.out;
    if (rows == 0 || in == 0) {
      std::fill_n(to, p.in * p.out, T{});
      continue;
    }
    const int64_t row = PlacedRows<P>::distance(rows), padded = PlacedRows<P>::padded(rows);
    const Workspace space(static_cast<size_t>(in * row) * sizeof(E));
    E* const turned = static_cast<E*>(space.data());
    const bool worth = grouped_worth_threads(in * out, rows);
    constexpr int64_t kBlock = 64;
    parallel.for_each((in + kBlock - 1) / kBlock, worth, [&](int64_t i) {
      const int64_t last = std::min(in, (i + 1) * kBlock);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = i * kBlock; k < last; ++k) turned[k * row + r] = P::element(x[(first + r) * p.x_row + k]);
      for (int64_t k = i * kBlock; k < last; ++k)
        std::fill(turned + k * row + rows, turned + k * row + padded, P::element(T{}));
    });
    const PlacedRows<P> a{turned, row};
    parallel.for_each(tiles, worth, [&](int64_t tile) {
      const int64_t n = tile * kPanel, width = std::min<int64_t>(kPanel, p.out - n);
      auto within = [&](int64_t left) { return static_cast<int>(std::clamp<int64_t>(left, 0, TileColumns::kRun)); };
      const TileColumns columns{{n, n + TileColumns::kRun}, {within(out - n), within(out - n - TileColumns::kRun)}};
      const int64_t valid = columns.count[0] + columns.count[1];
      if (valid > 0) {
        const GroupProduct<T, T> product(WeightLayout::columns, dy + first * p.dy_row, p.dy_row, rows, in);
        product.tile(tile, columns, a, in, [&](int64_t k, int64_t count, const C* c) {
          for (int64_t r = 0; r < count; ++r)
            for_vectors<V>(valid, [&](int64_t j, int some) {
              store_n(V::load(c + r * kPanel + j), to + (k + r) * p.out + n + j, some);
            });
        });
      }
      for (int64_t k = 0; k < p.in; ++k) {
        const int64_t from = k < in ? valid : 0;
        std::fill(to + k * p.out + n + from, to + k * p.out + n + width, T{});
      }
    });
  }
}

}  // namespace effops::cpu::EFFOPS_ISA
