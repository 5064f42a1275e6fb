#include "check.h"
#include "common/grouped_plan.h"

namespace effops::test {
namespace {

TEST(loops_of_groups) {
  for (int64_t rows : {1, 47}) CHECK(grouped_loop(WeightLayout::rows, rows) == GroupedLoop::stream, rows);
  CHECK(grouped_loop(WeightLayout::rows, 48) == GroupedLoop::pack, "many rows");
  for (int64_t rows : {1, 1000}) {
    CHECK(grouped_loop(WeightLayout::columns, rows) == GroupedLoop::pack, rows);
    CHECK(grouped_loop(WeightLayout::panels, rows) == GroupedLoop::panels, rows);
  }
}

TEST(plans_of_groups_cover_everything) {
  for (int threads : {1, 2, 64})
    for (int64_t rows : {0, 1, 100, 5000, 100000})
      for (int64_t tiles : {1, 3, 64, 900})
        for (int64_t groups : {1, 8, 128}) {
          const GroupedPlan plan = plan_grouped(rows, tiles, groups, threads);
          CHECK(plan.tiles_a_task >= 1 && plan.tiles_a_task <= 4, plan.tiles_a_task);
          CHECK(plan.rows_a_task >= 1 && (plan.rows_a_task >= 512 || plan.rows_a_task >= rows), plan.rows_a_task);
          const GroupedPlan sum = plan_scatter(rows, tiles, threads);
          CHECK(sum.tiles_a_task >= 1 && sum.tiles_a_task <= 8, sum.tiles_a_task);
        }
}

TEST(few_tiles_and_many_rows_are_cut_by_rows) {
  const GroupedPlan plan = plan_grouped(100000, 1, 2, 8);
  CHECK(plan.rows_a_task < 100000 / 2, plan.rows_a_task);
}

}  // namespace
}  // namespace effops::test
