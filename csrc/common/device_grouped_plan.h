// The schedule of grouped products on a device: the tile's shape and how many tiles there may be. From sizes alone, for
// offsets are on the device: a fixed number of blocks find their tiles themselves. A row's bits do not depend on the
// shape, which all add up a row's products in one order.
#pragma once

#include <cstdint>

#include "common/grouped_problem.h"
#include "common/host_device.h"

namespace effops::device {

enum class GroupedShape : int8_t { few, some, many };  // rows a group

struct GroupedTile {
  int rows, columns, depth, stages;
  int blocks;  // an SM, that registers have to be enough for, as shared memory is
};

inline constexpr int kGroupedThreads = 128;

// Shapes of 16-bit elements. `few` keeps the most bytes of weights under way, `many` loads the fewest for a product.
constexpr GroupedTile grouped_tile(GroupedShape shape) {
  return shape == GroupedShape::few    ? GroupedTile{16, 64, 64, 4, 4}
         : shape == GroupedShape::some ? GroupedTile{64, 128, 64, 3, 2}
                                       : GroupedTile{128, 128, 32, 4, 2};
}
// Of float32: on CUDA cores, so that there is no third.
constexpr GroupedTile grouped_tile_f32(GroupedShape shape) {
  return shape == GroupedShape::few ? GroupedTile{16, 64, 32, 3, 4} : GroupedTile{64, 64, 32, 3, 4};
}

inline constexpr int64_t kFewRows = 8, kSomeRows = 64;  // a group, on average

struct GroupedPlan {
  GroupedShape shape = GroupedShape::few;
  GroupedTile tile = grouped_tile(GroupedShape::few);
  int64_t column_tiles = 0;   // of a group
  int64_t tiles_at_most = 0;  // whatever the offsets are
};

inline GroupedPlan plan_grouped(const GroupedProblem& p) {
  GroupedPlan plan;
  const int64_t own = p.rows / max_of<int64_t>(p.groups, 1);
  plan.shape = own <= kFewRows ? GroupedShape::few : own <= kSomeRows ? GroupedShape::some : GroupedShape::many;
  // Bytes become numbers once a tile, in two more buffers: not for the widest one.
  if (p.scale != nullptr) plan.shape = min_of(plan.shape, GroupedShape::some);
  if (p.dtype == DType::f32) plan.shape = min_of(plan.shape, GroupedShape::some);
  plan.tile = p.dtype == DType::f32 ? grouped_tile_f32(plan.shape) : grouped_tile(plan.shape);
  plan.column_tiles = (p.out + plan.tile.columns - 1) / plan.tile.columns;
  const int64_t row_tiles = p.rows / plan.tile.rows + min_of(p.groups, p.rows);
  plan.tiles_at_most = row_tiles * plan.column_tiles;
  return plan;
}

}  // namespace effops::device
