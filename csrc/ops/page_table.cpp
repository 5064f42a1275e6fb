// Page tables of paged caches, and the check of what they name.
#include "common/attention_plan.h"
#include "ops/attention.h"

namespace effops::ops {

PageTableArg::PageTableArg(const Arg& table, const Arg& like, int64_t batch, int64_t kv_heads, int64_t page) {
  table.is(type_int32(), "int32").same_device(like);
  EFFOPS_CHECK(table.dim == 2 || table.dim == 3, table.op, ": ", table.name,
               ": expected shape [B, entries] or [B, G, entries], got ", table.shape());
  if (table.dim == 2) {
    check_shape(table, {{"B", batch}, {"entries", -1}});
  } else {
    check_shape(table, {{"B", batch}, {"G", kv_heads}, {"entries", -1}});
  }
  static const int32_t none = 0;
  const auto* data = reinterpret_cast<const int32_t*>(table.data());
  pages = readable = {data ? data : &none, table.stride(0), table.dim == 3 ? table.stride(1) : 0,
                      table.stride(table.dim - 1), std::max<int64_t>(page, 1)};
  if (checked_in_place(table)) return;
  values_ = Readable<int32_t>(table);
  readable.data = values_ ? (values_.data() ? values_.data() : &none) : nullptr;
  readable.batch = values_.stride(0);
  readable.head = table.dim == 3 ? values_.stride(1) : 0;
  readable.entry = values_.stride(table.dim - 1);
}

void check_pages(const char* op, const char* name, const AttentionProblem& p, int64_t count) {
  const bool a_head = p.lens_a_head || p.head_windows || p.pages.head != 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < (a_head ? p.kv_heads : 1); ++g) {
      const Sequence s = sequence_of(p, b, g);
      if (s.q_len == 0) continue;
      const TileList seen = TileList::of(visibility_of(p, s, g), s.positions(0, s.q_len - 1));
      for (int part = 0; part < 2; ++part) {
        if (seen.end[part] <= seen.begin[part]) continue;
        for (int64_t i = seen.begin[part] / p.pages.page; i <= (seen.end[part] - 1) / p.pages.page; ++i) {
          const int64_t page = p.pages.entry_of(b, g, i);
          EFFOPS_CHECK(page >= 0 && page < count, op, ": ", name, ": expected pages in [0, ", count, "), got ", page,
                       " at entry ", i, " of sequence ", b);
        }
      }
    }
}

}  // namespace effops::ops
