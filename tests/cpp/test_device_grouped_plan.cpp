// The schedule of grouped products on a device.
#include "common/device_grouped_plan.h"

#include "check.h"

namespace effops::test {
namespace {

using device::grouped_tile;
using device::grouped_tile_f32;
using device::GroupedPlan;
using device::GroupedShape;
using device::plan_grouped;

GroupedProblem problem(DType dtype, int64_t rows, int64_t groups, int64_t out = 300) {
  GroupedProblem p;
  p.dtype = dtype;
  p.rows = rows;
  p.groups = groups;
  p.in = 64;
  p.out = out;
  return p;
}

GroupedShape shape(int64_t rows, int64_t groups) { return plan_grouped(problem(DType::bf16, rows, groups)).shape; }

TEST(grouped_plan_by_rows_a_group) {
  CHECK(shape(1, 8) == GroupedShape::few && shape(64, 8) == GroupedShape::few, "decoding");
  CHECK(shape(72, 8) == GroupedShape::some && shape(64 * 8, 8) == GroupedShape::some, "a few sequences");
  CHECK(shape(65 * 8, 8) == GroupedShape::many && shape(1 << 20, 1) == GroupedShape::many, "prompts");
  CHECK(shape(5, 0) == GroupedShape::few && shape(0, 0) == GroupedShape::few, "no group");
}

TEST(grouped_plan_of_what_has_fewer_shapes) {
  for (int64_t rows : {3, 200, 100000}) {
    const GroupedPlan plan = plan_grouped(problem(DType::f32, rows, 2));
    CHECK(plan.shape <= GroupedShape::some && plan.tile.columns == grouped_tile_f32(plan.shape).columns, rows);
    const float scale = 1;
    GroupedProblem bytes = problem(DType::bf16, rows, 2);
    bytes.scale = &scale;
    CHECK(plan_grouped(bytes).shape <= GroupedShape::some, rows);
  }
}

// However rows fall to groups, there are no more tiles than the launch counts with.
TEST(grouped_plan_counts_all_tiles) {
  uint32_t state = 1;
  const auto draw = [&](int64_t most) { return (state = state * 1664525 + 1013904223) / 4096 % (most + 1); };
  for (DType dtype : {DType::bf16, DType::f32})
    for (int64_t groups : {1, 5, 64})
      for (int64_t rows : {0, 1, 7, 100, 999, 20000})
        for (int64_t out : {1, 64, 65, 1000}) {
          const GroupedPlan plan = plan_grouped(problem(dtype, rows, groups, out));
          CHECK(plan.column_tiles * plan.tile.columns >= out && (plan.column_tiles - 1) * plan.tile.columns < out, out);
          int64_t tiles = 0, left = rows;
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t own = g + 1 == groups ? left : draw(2 * left / (groups - g));
            tiles += (own + plan.tile.rows - 1) / plan.tile.rows * plan.column_tiles;
            left -= own;
          }
          CHECK(tiles <= plan.tiles_at_most, tiles, " > ", plan.tiles_at_most, " of ", rows, " rows");
        }
}

// 128 threads fill a tile's chunks in whole rounds, and blocks that registers are kept for fit a GPU's shared memory.
TEST(grouped_plan_shapes) {
  for (GroupedShape shape : {GroupedShape::few, GroupedShape::some, GroupedShape::many}) {
    const auto t = grouped_tile(shape);
    CHECK(t.rows % 16 == 0 && t.columns % 32 == 0 && t.depth % 32 == 0, t.rows);
    CHECK(t.rows * t.depth % (8 * device::kGroupedThreads) == 0, t.rows);
    CHECK(t.blocks * t.stages * (t.rows + t.columns) * t.depth * 2 <= 220 * 1024, t.rows);
  }
}

}  // namespace
}  // namespace effops::test
