#include "common/attention_plan.h"

#include <sstream>

namespace effops {

AttentionPlan plan_attention(const AttentionProblem& p) {
  AttentionPlan plan;
  const int64_t group = p.group();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = sequence_of(p, b).q_len * group;
    const int64_t block = streams(rows, p.head_dim) ? rows : kBlockRows;
    const int64_t split = streams(rows, p.head_dim) ? kStreamSplit : rows <= kSplitRows ? kBlockSplit : INT64_MAX;
    for (int64_t g = 0; g < p.kv_heads; ++g) {
      const Sequence s = sequence_of(p, b, g);
      const Visibility see = visibility_of(p, s, g);
      for (int64_t row = 0; row < rows; row += block) {
        const int64_t end = std::min(rows, row + block);
        const int64_t tiles = TileList::of(see, s.positions(row / group, (end - 1) / group)).count();
        const int64_t splits = tiles <= split ? 1 : (tiles + split - 1) / split;
        for (int64_t i = 0; i < splits; ++i) {
          const int64_t first = splits == 1 ? 0 : i * split,
                        last = splits == 1 ? tiles : std::min(tiles, first + split);
          const int64_t partial = splits == 1 ? -1 : plan.partial_rows;
          plan.tasks.push_back({b, g, row, end, first, last, static_cast<int32_t>(splits), partial});
          if (splits > 1) plan.partial_rows += end - row;
        }
        plan.multiplications += (end - row) * tiles * kTileKeys * (p.head_dim + p.v_dim);
      }
    }
  }
  return plan;
}

std::string explain_attention(const AttentionProblem& p, const char* isa) {
  const AttentionPlan plan = plan_attention(p);
  const int64_t rows = p.q_len * p.group();
  int64_t splits = 1;
  for (const AttentionTask& t : plan.tasks) splits = std::max<int64_t>(splits, t.splits);
  const int64_t bytes = p.batch * p.kv_heads * p.kv_capacity * (p.head_dim + p.v_dim) * int64_t(size_of(p.dtype));
  std::ostringstream o;
  o << "backend: cpu\n"
    << "isa: " << (p.dtype == DType::f64 ? "float64 vectors of " : "") << isa << "\n"
    << "loop: " << (streams(rows, p.head_dim) ? "streaming" : "gemm") << "\n"
    << "rows_per_kv_head: " << rows << "\n"
    << "row_block: " << (streams(rows, p.head_dim) ? rows : kBlockRows) << "\n"
    << "tile_keys: " << kTileKeys << "\n"
    << "splits: " << splits << "\n"
    << "tasks: " << plan.tasks.size() << "\n"
    << "threads_used: " << (plan.multiplications > kSerialWork ? "yes" : "no, too little work") << "\n"
    << "workspace_bytes: " << plan.partial_rows * (p.v_dim + 2) * 4 << "\n"
    << "kv_bytes: " << bytes << "\n"
    << "flops: " << 2 * plan.multiplications << "\n";
  return o.str();
}

}  // namespace effops
