// Rows sorted by group times one matrix a group.
#pragma once

#include <vector>

#include "common/parallel.h"
#include "cpu/layer/layer.h"
#include "cpu/moe/epilogue.h"
#include "cpu/moe/group_product.h"

namespace effops::cpu::EFFOPS_ISA {

// A group that has rows.
struct Group {
  int64_t index, first, rows;
};

inline int64_t in_of(const GroupedProblem& p, const Group& g) {
  return p.in_sizes != nullptr ? p.in_sizes[g.index] : p.in;
}
inline int64_t out_of(const GroupedProblem& p, const Group& g) {
  return p.out_sizes != nullptr ? p.out_sizes[g.index] : p.out;
}

inline std::vector<Group> groups_of(const GroupedProblem& p) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t end = p.offsets[g];
    if (end > first) groups.push_back({g, first, end - first});
    first = end;
  }
  return groups;
}

template <class T, class W>
GroupProduct<T, W> product_of_group(const GroupedProblem& p, const Group& group, bool invariant) {
  const int64_t rows = invariant ? kStreamGroupRows + 1 : group.rows;
  return {p.layout, reinterpret_cast<const W*>(p.w) + group.index * p.w_group,
          p.layout == WeightLayout::columns ? p.w_in : p.w_out, in_of(p, group), rows};
}

// The rows that the groups name, side by side.
template <class T>
PlacedRows<product_of<T>> place_rows(const GroupedProblem& p, const std::vector<Group>& groups,
                                     typename product_of<T>::Element* to, const Parallel& parallel) {
  using P = product_of<T>;
  const int64_t padded = PlacedRows<P>::padded(p.in), row = PlacedRows<P>::distance(p.in);
  const T* x = reinterpret_cast<const T*>(p.x);
  constexpr int64_t kPiece = 64;
  for (const Group& g : groups) {
    parallel.for_each((g.rows + kPiece - 1) / kPiece, g.rows * p.in > kLayerSerial, [&](int64_t piece) {
      for (int64_t i = g.first + piece * kPiece; i < std::min(g.first + g.rows, g.first + (piece + 1) * kPiece); ++i) {
        const int64_t source = p.order != nullptr ? p.order[i] / p.k : i;
        place_row<P>(x + source * p.x_row, in_of(p, g), padded, to + i * row);
      }
    });
  }
  return {to, row};
}

template <class T>
int64_t placed_elements(int64_t rows, int64_t in) {
  using Rows = PlacedRows<product_of<T>>;
  return (rows + Rows::kBeyond) * Rows::distance(in);
}

template <class T>
void grouped_typed(const GroupedProblem& p, const Parallel& parallel) {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;
  using E = typename P::Element;
  T* const y = reinterpret_cast<T*>(p.y);
  const std::vector<Group> groups = groups_of(p);
  const int64_t end = groups.empty() ? 0 : groups.back().first + groups.back().rows, features = p.features();
  for (int64_t i = end; i < p.rows; ++i) std::fill_n(y + i * p.y_row, features, T{});
  if (groups.empty() || features == 0) return;

  const Workspace space(placed_elements<T>(end, p.in) * sizeof(E));
  const PlacedRows<P> x = place_rows<T>(p, groups, static_cast<E*>(space.data()), parallel);
  const int64_t tiles = tiles_of(p), each = features_a_tile(p);
  const GroupedPlan plan = plan_grouped(end, tiles, static_cast<int64_t>(groups.size()), parallel.threads);
  struct Task {
    const Group* group;
    int64_t tile, first, rows;
  };
  std::vector<Task> tasks;
  for (const Group& g : groups)
    for (int64_t first = 0; first < g.rows; first += plan.rows_a_task)
      for (int64_t tile = 0; tile < tiles; tile += plan.tiles_a_task)
        tasks.push_back({&g, tile, g.first + first, std::min(plan.rows_a_task, g.rows - first)});
  const bool worth = grouped_worth_threads(groups.size() * p.in * p.out, end / groups.size());
  parallel.for_each(static_cast<int64_t>(tasks.size()), worth, [&](int64_t i) {
    const Task& task = tasks[i];
    const Group& g = *task.group;
    const auto product = product_of_group<T, T>(p, g, p.invariant);
    for (int64_t tile = task.tile; tile < std::min(tiles, task.tile + plan.tiles_a_task); ++tile) {
      const TileColumns columns = columns_of(p, tile, out_of(p, g));
      const int64_t n = tile * each;
      const int count = static_cast<int>(std::min(each, features - n));
      const int valid = p.gated ? count : columns.count[0] + columns.count[1];
      if (valid == 0) {
        for (int64_t r = 0; r < task.rows; ++r) std::fill_n(y + (task.first + r) * p.y_row + n, count, T{});
        continue;
      }
      const TileEpilogue<T> epilogue(p, g.index, columns);
      product.tile(tile, columns, x.from(task.first), task.rows, [&](int64_t first, int64_t rows, const C* c) {
        for (int64_t r = 0; r < rows; ++r) {
          alignas(64) C values[kPanel];
          epilogue.row(c + r * kPanel, values);
          std::fill(values + valid, values + kPanel, C(0));
          T* const to = y + (task.first + first + r) * p.y_row + n;
          for_vectors<V>(count, [&](int64_t j, int some) { store_n(V::load(values + j), to + j, some); });
        }
      });
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
