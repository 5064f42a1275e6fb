// append_page_bounds and page_topk: which tokens of a cache a query is likeliest to attend to, by bounds of its pages.
#include "common/page_bounds.h"

#include <limits>

#include "ops/attention.h"

namespace effops::ops {
namespace {

constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();

void check_page(const char* op, int64_t page, int64_t pages) {
  EFFOPS_CHECK(page >= 1 && page <= kMostTokens / std::max<int64_t>(pages, 1), op,
               ": page: expected 1 or more, and P * page less than 2^31, got ", page, " beside P = ", pages);
}

void append_page_bounds(Tensor low, Tensor high, Tensor k, Tensor slots, int64_t page) {
  const char* op = "append_page_bounds";
  const Backend backend(op, low);
  const Arg least(op, "low", low), most(op, "high", high), keys(op, "k", k);
  PageAppendProblem p;
  p.dtype = least.dtype();
  least.rank(4, "[B, P, G, D]");
  p.batch = least.size(0);
  p.pages = least.size(1);
  p.heads = least.size(2);
  p.dim = least.size(3);
  most.same_dtype(least).same_device(least);
  check_shape(most, {{"B", p.batch}, {"P", p.pages}, {"G", p.heads}, {"D", p.dim}});
  keys.same_dtype(least).same_device(least);
  check_shape(keys, {{"B", p.batch}, {"T", -1}, {"G", p.heads}, {"D", p.dim}});
  p.tokens = keys.size(1);
  check_page(op, page, p.pages);
  p.page = page;
  p.slots = token_indices(Arg(op, "slots", slots), least, p.batch, p.tokens, -1, p.pages * page);
  p.keys = view4(keys, unconst(keys.data()));
  p.low = view4(least, least.mutable_data());
  p.high = view4(most, most.mutable_data());
  if (p.batch * p.tokens * p.heads * p.dim == 0) return;
  backend.run(&cpu::Kernels::page_append, &DeviceLibrary::page_append, p);
}

Tensor page_topk(Tensor q, Tensor low, Tensor high, int64_t pages, int64_t page, OptionalTensor kv_lens,
                 int64_t num_sinks, int64_t window, bool each_head) {
  const char* op = "page_topk";
  const Backend backend(op, q);
  const Arg query(op, "q", q), least(op, "low", low), most(op, "high", high);
  PageSearchProblem p;
  p.dtype = query.dtype();
  query.rank(4, "[B, T = 1, H, D]");
  EFFOPS_CHECK(query.size(1) == 1, op, ": q: expected shape [B, T = 1, H, D], got ", query.shape());
  p.batch = query.size(0);
  p.heads = query.size(2);
  p.dim = query.size(3);
  least.same_dtype(query).same_device(query);
  check_shape(least, {{"B", p.batch}, {"P", -1}, {"G", -1}, {"D", p.dim}});
  p.pages = least.size(1);
  p.kv_heads = least.size(2);
  EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op,
               ": low: expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
  most.same_dtype(query).same_device(query);
  check_shape(most, {{"B", p.batch}, {"P", p.pages}, {"G", p.kv_heads}, {"D", p.dim}});
  check_page(op, page, p.pages);
  EFFOPS_CHECK(num_sinks >= 0, op, ": num_sinks: expected 0 or more, got ", num_sinks);
  EFFOPS_CHECK(window >= 0, op, ": window: expected 0 or more, got ", window);
  p.page = page;
  p.num_sinks = num_sinks;
  p.window = window;
  // Numbers of tokens first: sums of larger ones might overflow.
  EFFOPS_CHECK(pages >= 0 && pages <= kMostTokens / page && num_sinks <= pages * page && window <= pages * page &&
                   p.sink_pages() + p.window_pages() <= pages,
               op, ": pages: expected as many as num_sinks and window may touch or more, and pages * page less than ",
               "2^31, got ", pages, " pages of ", page, " tokens beside ", num_sinks, " and ", window);
  const Values<int32_t> lens(op, "kv_lens", kv_lens, {"B", p.batch}, query);
  check_range(op, "kv_lens", lens, 0, p.pages * page, "P * page");
  p.each_head = each_head;
  p.q = view4(query, unconst(query.data()));
  p.low = view4(least, unconst(least.data()));
  p.high = view4(most, unconst(most.data()));
  p.kv_lens = lens.get();
  p.count = pages;
  Tensor indices = empty({p.batch, p.lists(), pages * page}, type_int32(), query);
  p.indices = reinterpret_cast<int32_t*>(Arg(op, "indices", indices).mutable_data());
  if (p.batch == 0 || pages == 0) return indices;
  if (backend.device()) {
    Tensor memory;
    void* workspace = backend.workspace(memory, query, &DeviceLibrary::page_search_workspace, p);
    backend.launch(&DeviceLibrary::page_search, p, workspace);
  } else {
    cpu::kernels().page_search(p, torch_threads());
  }
  return indices;
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("append_page_bounds", TORCH_BOX(&append_page_bounds));
  m.impl("page_topk", TORCH_BOX(&page_topk));
}

}  // namespace effops::ops
