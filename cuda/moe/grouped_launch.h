#pragma once

#include "moe/grouped_tiles.h"

namespace effops::device {

template <class Shape>
int launch_grouped_shape(const GroupedParams& a, const GroupedPlan& plan, void* stream) {
  constexpr int64_t kShared = GroupedTiles<Shape>::kSharedBytes;
  int64_t blocks = 0;
  if (const int status = resident_blocks<Shape>(&grouped_tiles<Shape>, kGroupedThreads, kShared, blocks)) return status;
  const int64_t most = max_of(plan.tiles_at_most, a.p.groups > 0 ? 1 : a.p.rows);
  const dim3 grid(static_cast<unsigned>(min_of(blocks, most)));
  return launch<GroupedParams>({"grouped", grid, kGroupedThreads, kShared, stream}, &grouped_tiles<Shape>, a);
}

template <class T, class U, bool kInner>
int launch_grouped(const GroupedParams& a, const GroupedPlan& plan, void* stream) {
  if (plan.shape == GroupedShape::few)
    return launch_grouped_shape<TileShape<T, U, GroupedShape::few, kInner>>(a, plan, stream);
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, U>)
    if (plan.shape == GroupedShape::many)
      return launch_grouped_shape<TileShape<T, U, GroupedShape::many, kInner>>(a, plan, stream);
  return launch_grouped_shape<TileShape<T, U, GroupedShape::some, kInner>>(a, plan, stream);
}

}  // namespace effops::device
