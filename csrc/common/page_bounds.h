// Bounds of pages: the least and the largest of each channel over the keys of so many tokens, by which the pages that a
// query is likeliest to attend to are found without reading the keys (Quest, arXiv 2406.10774).
#pragma once

#include "common/dtype.h"
#include "common/selection_range.h"
#include "common/views.h"

namespace effops {

struct PageAppendProblem {
  DType dtype = DType::f32;  // of keys and bounds
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0;
  int64_t pages = 0, page = 1;  // of a sequence; tokens of a page
  TensorView4 keys, low, high;  // [batch, tokens, heads, dim], [batch, pages, heads, dim]
  TokenIndices slots;           // negative skips
};

// A query head's bound of a page is the sum over the channels of max(q * low, q * high): products and sums in float32,
// channel c in number c % 32 of 32 sums, which are then added by halves. The order is that of every kernel and of the
// reference, so that bounds are the same everywhere; and since rounding keeps order, no bound lies below the score of a
// key that is summed like it.
inline constexpr int kBoundSums = 32;

struct PageSearchProblem {
  DType dtype = DType::f32;  // of q and bounds
  int64_t batch = 0, heads = 0, kv_heads = 0, dim = 0;
  int64_t pages = 0, page = 1;        // of a sequence; tokens of a page
  bool each_head = false;             // a list for each query head, otherwise for each KV head
  TensorView4 q, low, high;           // [batch, 1, heads, dim], [batch, pages, kv_heads, dim]
  const int32_t* kv_lens = nullptr;   // [batch]
  int64_t num_sinks = 0, window = 0;  // first and last tokens whose pages are taken whatever their bounds
  int64_t count = 0;                  // pages a list
  int32_t* indices = nullptr;         // [batch, lists, count * page]: tokens, ascending, then -1

  EFFOPS_HD int64_t group() const { return heads / kv_heads; }
  EFFOPS_HD int64_t lists() const { return each_head ? heads : kv_heads; }
  EFFOPS_HD int64_t rows() const { return each_head ? 1 : group(); }  // query heads of a list
  EFFOPS_HD int64_t first_head(int64_t list) const { return each_head ? list : list * group(); }
  EFFOPS_HD int64_t length(int64_t b) const {
    return kv_lens ? clamp_to<int64_t>(kv_lens[b], 0, pages * page) : pages * page;
  }
  // Of whole pages.
  EFFOPS_HD int64_t sink_pages() const { return (num_sinks + page - 1) / page; }
  EFFOPS_HD int64_t window_pages() const { return window == 0 ? 0 : (window - 1 + page - 1) / page + 1; }  // at most
};

EFFOPS_HD inline SelectionRange range_of(const PageSearchProblem& p, int64_t b) {
  const int64_t length = p.length(b), end = (length + p.page - 1) / p.page;
  const int64_t last = p.window == 0 ? end : max_of<int64_t>(length - p.window, 0) / p.page;
  return SelectionRange::of(0, end, p.sink_pages(), last, p.count);
}

}  // namespace effops
