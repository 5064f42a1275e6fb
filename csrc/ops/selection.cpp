// Lists of the tokens that heads attend to: their check, and for the processor their entries without the gaps.
#include "ops/attention.h"

namespace effops::ops {

SelectionArg::SelectionArg(const Arg& indices, const Arg& like, const AttentionProblem& p) {
  indices.is(type_int32(), "int32").same_device(like).rank(3, "[B, 1 or G or H, S]");
  const int64_t heads = indices.size(1);
  EFFOPS_CHECK(indices.size(0) == p.batch && (heads == 1 || heads == p.kv_heads || heads == p.heads), indices.op,
               ": indices: expected shape [B = ", p.batch, ", 1 or G = ", p.kv_heads, " or H = ", p.heads, ", S], got ",
               indices.shape());
  static const int32_t none = -1;
  const auto* data = reinterpret_cast<const int32_t*>(indices.data());
  selection_ = {data ? data : &none, indices.stride(0), heads > 1 ? indices.stride(1) : 0, indices.stride(2),
                indices.size(2)};
  lists_ = heads;
}

namespace {

struct Bounds {
  int64_t low = 0, high = INT64_MAX;  // of tokens that all heads of a list have
};

// heads [first, end) of the problem read list h.
Bounds bounds_of(const AttentionProblem& p, int64_t b, int64_t first, int64_t end) {
  Bounds bounds;
  for (int64_t g = first; g < end; ++g) {
    const Sequence s = sequence_of(p, b, g);
    bounds.low = std::max(bounds.low, s.kv_start);
    bounds.high = std::min(bounds.high, s.kv_len);
  }
  return bounds;
}

// Are all of these entries tokens? Without a branch, for the usual list is thousands of them.
bool all_within(const int32_t* list, int64_t count, const Bounds& bounds) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, list[i]);
    high = std::max(high, list[i]);
  }
  return count == 0 || (low >= bounds.low && high < bounds.high);
}

}  // namespace

void SelectionArg::check(const Arg& indices, const AttentionProblem& p, int64_t pages) {
  const Readable<int32_t> values(indices);
  if (!values) return;
  const bool keep = !on_device();
  const int64_t lists = lists_, count = selection_.count;
  auto first_head = [&](int64_t h) { return lists == 1 ? 0 : lists == p.kv_heads ? h : h / p.group(); };
  auto end_head = [&](int64_t h) { return lists == 1 ? p.kv_heads : first_head(h) + 1; };
  bool plain = !p.pages.given() && values.stride(2) == 1;
  for (int64_t b = 0; plain && b < p.batch; ++b)
    for (int64_t h = 0; plain && h < lists; ++h)
      plain = all_within(values.data() + b * values.stride(0) + h * values.stride(1), count,
                         bounds_of(p, b, first_head(h), end_head(h)));
  if (plain) return;
  if (keep) {
    kept_.reserve(p.batch * lists * count);
    counts_.reserve(p.batch * lists);
  }
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < lists; ++h) {
      const int64_t first = first_head(h), end = end_head(h);  // one list is for all heads
      const auto [low, high] = bounds_of(p, b, first, end);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = values.at(b, h, i);
        if (j == -1) continue;
        EFFOPS_CHECK(j >= low && j < high, indices.op, ": indices: expected -1 or values in [", low, ", ", high,
                     "), got ", j, " at index [", b, ", ", h, ", ", i, "]");
        for (int64_t g = first; p.pages.given() && g < (p.pages.head != 0 ? end : first + 1); ++g) {
          const int64_t page = p.pages.entry_of(b, g, j / p.pages.page);
          EFFOPS_CHECK(page >= 0 && page < pages, indices.op, ": page_table: expected pages in [0, ", pages, "), got ",
                       page, " at entry ", j / p.pages.page, " of sequence ", b);
        }
        if (keep) kept_.push_back(static_cast<int32_t>(j));
      }
      if (keep) {
        const int64_t there = static_cast<int64_t>(kept_.size()) - (b * lists + h) * count;
        counts_.push_back(static_cast<int32_t>(there));
        kept_.resize((b * lists + h + 1) * count, -1);
      }
    }
  if (!keep) return;
  const int64_t head = lists > 1 ? 1 : 0;
  if (!kept_.empty()) selection_.data = kept_.data();
  selection_.batch = lists * count;
  selection_.head = head * count;
  selection_.entry = 1;
  selection_.counts = counts_.data();
  selection_.counts_batch = lists;
  selection_.counts_head = head;
}

void SelectionArg::apply(AttentionProblem& p) const {
  p.selected = selection_;
  if (lists_ <= 1 || lists_ == p.kv_heads) return;
  p.kv_share = p.group();
  p.kv_heads = p.heads;
}

}  // namespace effops::ops
