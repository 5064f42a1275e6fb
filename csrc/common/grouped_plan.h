// Which loop serves a group of rows on the CPU, and how the work is cut into tasks.
#pragma once

#include <string>

#include "common/grouped_problem.h"

namespace effops {

inline constexpr int64_t kGroupTile = 32;           // output features a tile
inline constexpr int64_t kGroupedSerial = 1 << 17;  // multiplications, or bytes of weights, that one thread does alone

enum class GroupedLoop : int8_t {
  stream,  // inner products with the weight's rows as they lie
  pack,    // tiles become panels first
  panels,  // the weight is in panels already
};

// Turning a tile into a panel costs as much as multiplying it with some 15 rows, and the panel's loop is the faster
// one; few rows do better without.
inline constexpr int64_t kStreamGroupRows = 47;
constexpr GroupedLoop grouped_loop(WeightLayout layout, int64_t rows_of_group) {
  if (layout == WeightLayout::panels) return GroupedLoop::panels;
  return layout == WeightLayout::rows && rows_of_group <= kStreamGroupRows ? GroupedLoop::stream : GroupedLoop::pack;
}

struct GroupedPlan {
  int64_t tiles_a_task = 1;  // neighbours in memory
  int64_t rows_a_task = 0;   // of a group
};

// Of one product, by shapes alone.
GroupedPlan plan_grouped(int64_t rows, int64_t tiles, int64_t groups, int threads);
// Of the second product of a layer, whose tasks take all groups: tiles_a_task only.
GroupedPlan plan_scatter(int64_t rows, int64_t tiles, int threads);

// Is the work worth threads? `weights` counts the elements that are read.
constexpr bool grouped_worth_threads(int64_t weights, int64_t rows_a_group) {
  return weights * (rows_a_group > 2 ? rows_a_group : 2) > kGroupedSerial;
}

}  // namespace effops
