// append_kv and commit_kv.
#include "ops/cache.h"
#include "common/append.h"

namespace effops::ops {

CacheShape cache_shape(const Arg& k, const Arg& v, const OptionalTensor& page_table, int64_t batch) {
  const char* op = k.op;
  k.rank(4, page_table ? "[P, page, G, D]" : "[B, L, G, D]");
  v.same_dtype(k).same_device(k);
  CacheShape shape;
  shape.heads = k.size(2);
  shape.capacity = k.size(1);
  if (!page_table) {
    check_shape(k, {{"B", batch}, {"L", -1}, {"G", -1}, {"D", -1}});
    check_shape(v, {{"B", batch}, {"L", k.size(1)}, {"G", shape.heads}, {"Dv", -1}});
    return shape;
  }
  check_shape(v, {{"P", k.size(0)}, {"page", k.size(1)}, {"G", shape.heads}, {"Dv", -1}});
  const Arg table(op, "page_table", *page_table);
  shape.table = PageTableArg(table, k, batch, shape.heads, k.size(1));
  shape.pages = shape.table.pages;
  shape.capacity *= table.size(table.dim - 1);
  shape.page_count = k.size(0);
  return shape;
}

void check_slot_pages(const Arg& like, const CacheShape& cache, int64_t b, int64_t slot) {
  const PageTable& pages = cache.table.readable;
  if (!pages.given()) return;
  for (int64_t h = 0; h < (pages.head ? cache.heads : 1); ++h) {
    const int64_t page = pages.entry_of(b, h, slot / pages.page);
    EFFOPS_CHECK(page >= 0 && page < cache.page_count, like.op, ": page_table: expected pages in [0, ",
                 cache.page_count, "), got ", page, " at entry ", slot / pages.page, " of sequence ", b);
  }
}

TokenIndices slots_of(const Arg& slots, const Arg& like, const CacheShape& cache, int64_t batch, int64_t tokens) {
  const TokenIndices at = token_indices(slots, like, batch, tokens, -1, cache.capacity);
  if (!cache.pages.given()) return at;
  if (const Readable<int32_t> values{slots}) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < tokens; ++t)
        if (values.at(b, t) >= 0) check_slot_pages(like, cache, b, values.at(b, t));
  }
  return at;
}

namespace {

void append_rows(const Backend& backend, const Arg& cache, const CacheShape& shape, const Arg& rows,
                 const TokenIndices& slots) {
  AppendProblem p;
  p.batch = rows.size(0);
  p.tokens = rows.size(1);
  p.heads = rows.size(2);
  p.dim = rows.size(3);
  p.bytes = size_of(rows.dtype());
  p.from = view4(rows, unconst(rows.data()));
  p.to = view4(cache, cache.mutable_data());
  p.pages = shape.pages;
  p.slots = slots;
  p.limits = shape.limits();
  backend.device() ? backend.launch(&DeviceLibrary::append_rows, p) : effops::append_rows(p);
}

void append_kv(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor slots, OptionalTensor page_table) {
  const char* op = "append_kv";
  const Backend backend(op, k_cache);
  const Arg kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache), ka(op, "k", k), va(op, "v", v);
  kc.dtype();
  ka.same_dtype(kc).same_device(kc);
  va.same_dtype(kc).same_device(kc);
  kc.rank(4, page_table ? "[P, page, G, D]" : "[B, L, G, D]");
  const int64_t batch = page_table ? ka.rank(4, "[B, T, G, D]").size(0) : kc.size(0);
  const CacheShape shape = cache_shape(kc, vc, page_table, batch);
  check_shape(ka, {{"B", batch}, {"T", -1}, {"G", shape.heads}, {"D", kc.size(3)}});
  check_shape(va, {{"B", batch}, {"T", ka.size(1)}, {"G", shape.heads}, {"Dv", vc.size(3)}});
  const TokenIndices at = slots_of(Arg(op, "slots", slots), kc, shape, batch, ka.size(1));
  append_rows(backend, kc, shape, ka, at);
  append_rows(backend, vc, shape, va, at);
}

// Nodes int32 [B, M]: ascending, then -1 to the end; every place from starts[b] on within the cache.
TokenIndices nodes_of(const Arg& nodes, const Arg& like, const CacheShape& cache, const Values<int32_t>& starts) {
  const int64_t batch = starts.count(), count = nodes.size(1);
  const TokenIndices at = token_indices(nodes, like, batch, count, -1, cache.capacity);
  const Readable<int32_t> values(nodes);
  for (int64_t b = 0; values && b < batch; ++b) {
    int64_t last = -1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t node = values.at(b, j);
      EFFOPS_CHECK(node < 0 || (j == 0 || values.at(b, j - 1) >= 0), nodes.op,
                   ": nodes: expected -1 to the end after the first, got ", node, " at index [", b, ", ", j, "]");
      if (node < 0) continue;
      EFFOPS_CHECK(node > last, nodes.op, ": nodes: expected ascending nodes, got ", node, " after ", last,
                   " at index [", b, ", ", j, "]");
      last = node;
      const int64_t start = starts.host()[b];
      EFFOPS_CHECK(start + node < cache.capacity, nodes.op, ": nodes: expected places below ", cache.capacity, ", got ",
                   start + node, " at index [", b, ", ", j, "]");
      check_slot_pages(like, cache, b, start + node);
      check_slot_pages(like, cache, b, start + j);
    }
  }
  return at;
}

void commit_kv(Tensor k_cache, Tensor v_cache, Tensor nodes, Tensor starts, OptionalTensor page_table) {
  const char* op = "commit_kv";
  const Backend backend(op, k_cache);
  const Arg kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache), na(op, "nodes", nodes);
  kc.dtype();
  kc.rank(4, page_table ? "[P, page, G, D]" : "[B, L, G, D]");
  na.is(type_int32(), "int32").same_device(kc);
  na.rank(2, "[B, M]");
  const int64_t batch = page_table ? na.size(0) : kc.size(0);
  const CacheShape shape = cache_shape(kc, vc, page_table, batch);
  const Values<int32_t> from(op, "starts", starts, {"B", batch}, kc);
  check_range(op, "starts", from, 0, shape.capacity, page_table ? "entries * page" : "L");
  const TokenIndices at = nodes_of(na, kc, shape, from);
  for (const Arg* cache : {&kc, &vc}) {
    CommitProblem p;
    p.batch = batch;
    p.nodes_a_row = na.size(1);
    p.heads = shape.heads;
    p.dim = cache->size(3);
    p.bytes = size_of(cache->dtype());
    p.cache = view4(*cache, cache->mutable_data());
    p.pages = shape.pages;
    p.nodes = at;
    p.starts = from.get();
    p.limits = shape.limits();
    backend.device() ? backend.launch(&DeviceLibrary::commit_rows, p) : commit_rows(p);
  }
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("commit_kv", TORCH_BOX(&commit_kv));
}

}  // namespace effops::ops
