// y = f(x) W^T (+ bias) (+ residual) with W in few bits, and where it is asked for with x in int8.
#pragma once

#include "cpu/gemv/packed_int8.h"
#include "cpu/gemv/packed_pairs.h"

namespace effops::cpu::EFFOPS_ISA {

// Rows once they are f(x), then panels of features: rows.place and packed_product<Steps>.
template <class T, class Steps, class Rows>
void packed_linear_with(const PackedLinearProblem& problem, const Rows& rows, const Parallel& parallel) {
  const LinearProblem& p = problem.linear;
  const PackedMatrix& w = problem.weight;
  parallel.for_each(rows.blocks(), p.rows * p.in > kLayerSerial, [&](int64_t block) {
    T* const prepared = static_cast<T*>(thread_scratch(Scratch::task, p.in * sizeof(T)));
    rows.place(block, [&](int64_t row) { return prepared_row(p, row, prepared); });
  });
  parallel.for_each(w.panels(), linear_worth_threads(p), [&](int64_t panel) {
    packed_product<Steps>(w, rows, panel, [&](int64_t first, int64_t count, const float* c) {
      const int64_t n = panel * kPackedPanel;
      for (int64_t r = 0; r < count; ++r)
        for_vectors<Vec>(std::min<int64_t>(kPackedPanel, p.out - n), [&](int64_t j, int some) {
          finish_features<T>(p, first + r, n + j, some, Vec::load(c + r * kPackedPanel + j));
        });
    });
  });
}

// Memory of a call: a long prompt's does not stay.
template <class Carve, class Run>
void in_workspace(Carve&& carve, Run&& run) {
  Carver measure;
  carve(measure);
  const Workspace workspace(measure.used());
  Carver memory(workspace.data());
  carve(memory);
  run();
}

template <class T>
void packed_linear_typed(const PackedLinearProblem& p, const Parallel& parallel) {
  const PackedMatrix& w = p.weight;
  const int64_t room = RowGroups::room(p.linear.rows, p.invariant);
  if (p.int8_activation)
    return with_dots(w.format, [&](auto dots) {
      using Rows = Int8Rows<decltype(dots)>;
      int32_t *x = nullptr, *sums = nullptr;
      float* steps = nullptr;
      in_workspace(
          [&](Carver& memory) {
            x = memory.take<int32_t>(room * Rows::words(w));
            steps = memory.take<float>(room * w.groups());
            sums = memory.take<int32_t>(room * w.groups());
          },
          [&] { packed_linear_with<T, decltype(dots)>(p, Rows(w, p.linear.rows, x, steps, sums), parallel); });
    });
  if constexpr (std::is_same_v<T, bf16> && Words::kPairs)
    if (in_pairs(w.format, p.linear.rows, p.invariant))
      return with_pairs(w.format, [&](auto pairs) {
        using Rows = PairRows<decltype(pairs)>;
        uint32_t* x = nullptr;
        float* sums = nullptr;
        in_workspace(
            [&](Carver& memory) {
              x = memory.take<uint32_t>(room * Rows::inputs(w));
              sums = memory.take<float>(room * w.groups());
            },
            [&] { packed_linear_with<T, decltype(pairs)>(p, Rows(w, p.linear.rows, p.invariant, x, sums), parallel); });
      });
  float *x = nullptr, *sums = nullptr;
  in_workspace(
      [&](Carver& memory) {
        x = memory.take<float>(room * PackedRows::inputs(w));
        sums = memory.take<float>(room * w.groups());
      },
      [&] {
        const PackedRows rows(w, p.linear.rows, p.invariant, x, sums);
        with_steps(w.format, [&](auto steps) { packed_linear_with<T, decltype(steps)>(p, rows, parallel); });
      });
}

}  // namespace effops::cpu::EFFOPS_ISA
