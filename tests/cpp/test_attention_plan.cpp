// The schedule: tasks cover every row and every visible key once, and no sequence's part depends on
// the others.
#include <map>
#include <tuple>

#include "check.h"
#include "common/attention_plan.h"
#include "tensor.h"

namespace effops::test {
namespace {

struct Drawn {  // a problem without data
  AttentionProblem p;
  std::vector<int32_t> lens, starts, prefixes, windows;
};

void draw(Random& random, Drawn& d) {
  AttentionProblem& p = d.p;
  p.batch = random.between(1, 3);
  p.kv_heads = random.between(1, 2);
  p.heads = p.kv_heads * random.pick<int64_t>({1, 2, 4, 7});
  p.q_len = random.pick<int64_t>({0, 1, 3, 16, 17, 100, 130, 600});
  p.kv_capacity = random.pick<int64_t>({0, 1, 64, 65, 700, 1024, 1025, 4200});
  p.head_dim = p.v_dim = random.pick<int64_t>({4, 80});
  p.causal = random.between(0, 1);
  p.num_sinks = random.pick<int64_t>({0, 4, 65});
  for (int64_t b = 0; b < p.batch; ++b) {
    d.lens.push_back(static_cast<int32_t>(random.between(p.kv_capacity / 2, p.kv_capacity)));
    d.starts.push_back(static_cast<int32_t>(random.pick<int64_t>({0, 0, random.between(0, p.kv_capacity)})));
    d.prefixes.push_back(static_cast<int32_t>(random.between(0, 90)));
  }
  for (int64_t g = 0; g < p.kv_heads; ++g)
    d.windows.push_back(static_cast<int32_t>(random.pick<int64_t>({0, 1, 50, 300})));
  p.kv_lens = d.lens.data();
  p.kv_starts = d.starts.data();
  if (random.between(0, 1)) p.prefix_lens = d.prefixes.data();
  if (random.between(0, 1)) p.head_windows = d.windows.data();
}

// Tiles of a row block: every visible key in one of them, none in two, none out of the sequence.
void check_tiles(const AttentionProblem& p, int64_t b, int64_t g, int64_t row_begin, int64_t row_end, int64_t tiles) {
  const Sequence s = sequence_of(p, b);
  const Visibility see = visibility_of(p, s, g);
  const int64_t first_position = s.position(row_begin / p.group()), last = s.position((row_end - 1) / p.group());
  const TileList list = TileList::of(see, {first_position, last});
  CHECK(tiles == list.count(), tiles, " tiles for ", list.count());
  std::vector<int> times(s.kv_len);
  for (int64_t i = 0; i < tiles; ++i) {
    int64_t first, keys;
    list.tile(i, first, keys);
    CHECK(keys >= 1 && keys <= kTileKeys && first >= see.start && first + keys <= s.kv_len, "tile ", i, ": ", first,
          " + ", keys);
    for (int64_t j = first; j < first + keys; ++j) ++times[j];
  }
  for (int64_t j = 0; j < s.kv_len; ++j) {
    bool visible = false;
    for (int64_t position = first_position; position <= last && !visible; ++position)
      visible = see.allowed(position, j);
    CHECK(times[j] <= 1 && (times[j] == 1 || !visible), "key ", j, " is in ", times[j], " tiles");
  }
}

TEST(plan_covers_rows_and_keys_once) {
  Random random(21);
  for (int i = 0; i < 150; ++i) {
    Drawn d;
    draw(random, d);
    const AttentionPlan plan = plan_attention(d.p);
    const int64_t rows = d.p.q_len * d.p.group();
    std::map<std::pair<int64_t, int64_t>, int64_t> next_row;  // per (sequence, KV head)
    int64_t partial_rows = 0;
    for (size_t t = 0; t < plan.tasks.size();) {
      const AttentionTask& task = plan.tasks[t];
      int64_t& row = next_row[{task.sequence, task.kv_head}];
      CHECK(task.row_begin == row && task.row_end > row && task.row_end <= rows, "rows ", task.row_begin, " to ",
            task.row_end, " after ", row);
      CHECK(streams(rows, d.p.head_dim) ? task.row_end == rows : task.row_end - row <= kBlockRows, task.row_end - row,
            " rows");
      row = task.row_end;
      int64_t tile = 0;
      const int32_t splits = task.splits;
      CHECK(splits >= 1 && t + splits <= plan.tasks.size(), splits, " splits");
      for (int32_t split = 0; split < splits; ++split, ++t) {
        const AttentionTask& part = plan.tasks[t];
        CHECK(part.sequence == task.sequence && part.kv_head == task.kv_head && part.row_begin == task.row_begin &&
                  part.row_end == task.row_end && part.splits == splits,
              "split ", split, " is of another block");
        CHECK(part.first_tile == tile && part.last_tile >= tile, "tiles from ", part.first_tile, " after ", tile);
        CHECK(part.partial == (splits == 1 ? -1 : partial_rows), "partial rows from ", part.partial);
        tile = part.last_tile;
        if (splits > 1) partial_rows += part.row_end - part.row_begin;
      }
      check_tiles(d.p, task.sequence, task.kv_head, task.row_begin, task.row_end, tile);
    }
    CHECK(plan.partial_rows == partial_rows, plan.partial_rows, " partial rows for ", partial_rows);
    for (int64_t b = 0; b < d.p.batch; ++b)
      for (int64_t g = 0; g < d.p.kv_heads; ++g)
        CHECK((next_row[{b, g}] == rows), "rows of sequence ", b, " end at ", next_row[{b, g}]);
  }
}

TEST(plan_of_a_sequence_is_the_same_in_any_batch) {
  Random random(22);
  auto facts = [](const AttentionTask& t) {
    return std::tuple(t.kv_head, t.row_begin, t.row_end, t.first_tile, t.last_tile, t.splits);
  };
  for (int i = 0; i < 100; ++i) {
    Drawn d;
    draw(random, d);
    const AttentionPlan plan = plan_attention(d.p);
    for (int64_t b = 0; b < d.p.batch; ++b) {
      AttentionProblem alone = d.p;
      alone.batch = 1;
      alone.kv_lens += b;
      alone.kv_starts += b;
      if (alone.prefix_lens) alone.prefix_lens += b;
      std::vector<AttentionTask> mine;
      for (const AttentionTask& t : plan.tasks)
        if (t.sequence == b) mine.push_back(t);
      const AttentionPlan own = plan_attention(alone);
      CHECK(own.tasks.size() == mine.size(), own.tasks.size(), " tasks for ", mine.size());
      for (size_t t = 0; t < mine.size(); ++t) CHECK(facts(own.tasks[t]) == facts(mine[t]), "task ", t);
    }
  }
}

TEST(plan_explains_itself) {
  AttentionProblem p;
  p.batch = 1;
  p.heads = p.kv_heads = 2;
  p.q_len = 1;
  p.kv_capacity = 2048;
  p.head_dim = p.v_dim = 64;
  const std::string text = explain_attention(p, "portable");
  CHECK(text.find("loop: streaming\n") != std::string::npos && text.find("splits: 2\n") != std::string::npos &&
            text.find("tasks: 4\n") != std::string::npos,
        text);
}

}  // namespace
}  // namespace effops::test
