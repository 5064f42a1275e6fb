#include "common/grouped_plan.h"

#include <algorithm>

namespace effops {
namespace {

constexpr int64_t kTasksAThread = 4;
constexpr int64_t kNeighbours = 4;    // tiles that read the same rows while these are near
constexpr int64_t kRowsAPiece = 512;  // where a product has too few tiles to go round
constexpr int64_t kManyRows = 1024;   // from here rows cost more memory traffic than weights

}  // namespace

GroupedPlan plan_grouped(int64_t rows, int64_t tiles, int64_t groups, int threads) {
  GroupedPlan plan;
  plan.rows_a_task = std::max<int64_t>(rows, 1);
  const int64_t wanted = threads * kTasksAThread;
  plan.tiles_a_task = std::clamp<int64_t>(tiles * groups / wanted, 1, kNeighbours);
  const int64_t tasks = (tiles + plan.tiles_a_task - 1) / plan.tiles_a_task * groups;
  if (tasks < wanted && rows > kRowsAPiece) plan.rows_a_task = std::max(kRowsAPiece, rows * tasks / wanted);
  return plan;
}

GroupedPlan plan_scatter(int64_t rows, int64_t tiles, int threads) {
  const int64_t most = rows > kManyRows ? 2 * kNeighbours : kNeighbours;
  return {std::clamp<int64_t>(tiles / (threads * kTasksAThread), 1, most), rows};
}

}  // namespace effops
