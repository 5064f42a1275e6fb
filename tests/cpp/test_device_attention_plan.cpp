// The schedule of attention on a device: limits hold, and what a sequence gets does not depend on bounds or neighbours.
#include "common/device_attention_plan.h"

#include "check.h"

namespace effops::test {
namespace {

using device::AttentionLimits;
using device::plan_attention;

AttentionProblem problem(DType dtype, int64_t tokens, int64_t group) {
  AttentionProblem p;
  p.dtype = dtype;
  p.batch = 3;
  p.heads = 2 * group;
  p.kv_heads = 2;
  p.q_len = tokens;
  p.head_dim = p.v_dim = 64;
  return p;
}

AttentionLimits limits_of(int64_t keys, int64_t rows = 0, int64_t tokens = 0) {
  AttentionLimits limits;
  limits.max_kv_len = keys;
  limits.q_rows = rows;
  limits.max_q_len = tokens;
  return limits;
}

// Splits that a row block of `tiles` tiles gets where the launch has `most` (cuda/attention/row_block.h).
int64_t splits(int64_t tiles, int64_t most) {
  const int64_t size = std::max<int64_t>(device::kSplitTiles, (tiles + most - 1) / most);
  return std::max<int64_t>(1, (tiles + size - 1) / size);
}

TEST(device_plan_covers_every_row_and_split) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t group : {1, 3, 8})
      for (int64_t tokens : {1, 2, 5, 16, 17, 40, 64, 65, 171, 512, 513})
        for (int64_t keys : {0, 1, 64, 256, 257, 5000, 16384, 100000}) {
          const auto plan = plan_attention(problem(dtype, tokens, group), limits_of(keys));
          const int64_t rows = tokens * group;
          CHECK(plan.rows == rows && plan.row_blocks * plan.block >= rows, rows);
          CHECK((plan.row_blocks - 1) * plan.block < rows, rows);
          CHECK(plan.splits >= 1 && plan.splits <= 64 && (rows <= device::kSplitRows || plan.splits == 1), plan.splits);
          CHECK(plan.slots == (plan.splits > 1 ? rows * plan.splits : 0), plan.slots);
          CHECK(plan.slots <= device::kPartialRows, plan.slots, " for ", rows, " rows");
          const int64_t tiles = (keys + kTileKeys - 1) / kTileKeys;
          for (int64_t own : {tiles, tiles + 1})  // sinks apart from the window cut a tile in two
            CHECK(splits(own, plan.splits) <= plan.splits || rows > device::kSplitRows, own, " tiles");
        }
}

TEST(device_plan_of_a_sequence_is_its_own) {
  const int32_t offsets[] = {0, 1, 2, 3};
  for (int64_t tokens : {1, 4, 16, 30, 64})
    for (int64_t keys : {100, 1000, 20000}) {
      const auto own = plan_attention(problem(DType::bf16, tokens, 1), limits_of(keys));
      AttentionProblem ragged = problem(DType::bf16, 0, 1);
      ragged.cu_q = offsets;
      const auto beside = plan_attention(ragged, limits_of(1 << 20, 5000, 2000));
      const int limit = device::split_limit(int(tokens), device::block_rows(false, tokens));
      const int64_t tiles = (keys + kTileKeys - 1) / kTileKeys;
      CHECK(splits(tiles, std::min(limit, own.splits)) == splits(tiles, std::min(limit, beside.splits)), tokens, keys);
    }
}

TEST(device_plan_of_nothing) {
  CHECK(plan_attention(problem(DType::bf16, 0, 1), limits_of(100)).row_blocks == 0, "no tokens");
  AttentionProblem none = problem(DType::f32, 3, 1);
  none.batch = 0;
  CHECK(plan_attention(none, limits_of(100)).row_blocks == 0, "no sequences");
}

}  // namespace
}  // namespace effops::test
