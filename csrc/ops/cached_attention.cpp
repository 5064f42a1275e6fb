// paged_attention, tree_attention and sparse_attention: queries over a KV cache, dense or in pages.
#include "ops/attention.h"

namespace effops::ops {
namespace {

// q [B, T, H, D], or [N, H, D] with offsets; k and v [B, L, G, D], or [P, page, G, D] with a page table;
// kv_lens [B], or [B, G] beside a page table.
struct Cached {
  Arg q, k, v;
  Values<int32_t> cu_q;
  Tensor lens;
  const int32_t* readable_lens = nullptr;  // for checks
  std::vector<int32_t> host_lens;
  PageTableArg table;
  AttentionProblem p;
  AttentionLimits limits;
  const char* capacity_name = "L";

  Cached(const Backend& backend, const char* op, const char* k_name, const char* v_name, const Tensor& q_,
         const Tensor& k_, const Tensor& v_, const OptionalTensor& page_table, const OptionalTensor& kv_lens,
         const OptionalTensor& cu_seqlens_q, std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len)
      : q(op, "q", q_), k(op, k_name, k_), v(op, v_name, v_), cu_q(op, "cu_seqlens_q", cu_seqlens_q, {"B + 1", -1}, q) {
    p.dtype = q.dtype();
    check_attention_dtype(backend, q);
    k.same_dtype(q).same_device(q);
    v.same_dtype(q).same_device(q);
    queries(op, cu_seqlens_q.has_value(), max_q_len);
    keys(op, page_table);
    limits.max_kv_len = p.kv_capacity;
    if (kv_lens) lengths(op, *kv_lens, page_table.has_value(), max_kv_len);
  }

  void queries(const char* op, bool ragged, std::optional<int64_t> max_q_len) {
    q.rank(ragged ? 3 : 4, ragged ? "[N, H, D]" : "[B, T, H, D]");
    p.heads = q.size(q.dim - 2);
    p.head_dim = q.size(q.dim - 1);
    EFFOPS_CHECK(p.head_dim > 0, op, ": q: expected D >= 1, got shape ", q.shape());
    if (!ragged) {
      p.batch = q.size(0);
      p.q_len = q.size(1);
      p.q = view4(q, unconst(q.data()));
      limits.max_q_len = p.q_len;
      return;
    }
    EFFOPS_CHECK(cu_q.count() > 0, op, ": cu_seqlens_q: expected shape [B + 1], got [0]");
    check_offsets(op, "cu_seqlens_q", cu_q, q.size(0), max_q_len, "max_q_len");
    p.batch = cu_q.count() - 1;
    p.cu_q = cu_q.get();
    p.q = view3(q, unconst(q.data()));
    limits.q_rows = q.size(0);
    limits.max_q_len = std::min(q.size(0), max_q_len.value_or(q.size(0)));
  }

  void keys(const char* op, const OptionalTensor& page_table) {
    k.rank(4, page_table ? "[P, page, G, D]" : "[B, L, G, D]");
    const int64_t first = k.size(0);
    p.kv_heads = k.size(2);
    if (page_table) {
      check_shape(k, {{"P", -1}, {"page", -1}, {"G", -1}, {"D", p.head_dim}});
      check_shape(v, {{"P", first}, {"page", k.size(1)}, {"G", p.kv_heads}, {"Dv", -1}});
    } else {
      check_shape(k, {{"B", p.batch}, {"L", -1}, {"G", -1}, {"D", p.head_dim}});
      check_shape(v, {{"B", first}, {"L", k.size(1)}, {"G", p.kv_heads}, {"Dv", -1}});
    }
    p.v_dim = v.size(3);
    EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, ": ", k.name,
                 ": expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
    p.kv_capacity = k.size(1);
    if (page_table) {
      const Arg entries(op, "page_table", *page_table);
      table = PageTableArg(entries, q, p.batch, p.kv_heads, k.size(1));
      p.pages = table.pages;
      p.kv_capacity *= entries.size(entries.dim - 1);
      limits.pages = first;
      capacity_name = "entries * page";
    }
    p.k = view4(k, unconst(k.data()));
    p.v = view4(v, unconst(v.data()));
  }

  void lengths(const char* op, const Tensor& kv_lens, bool paged, std::optional<int64_t> max_kv_len) {
    const Arg a(op, "kv_lens", kv_lens);
    a.is(type_int32(), "int32").same_device(q);
    p.lens_a_head = paged && a.dim == 2;
    if (p.lens_a_head) {
      check_shape(a, {{"B", p.batch}, {"G", p.kv_heads}});
    } else {
      check_shape(a, {{"B", p.batch}});
    }
    lens = kv_lens;
    p.kv_lens = reinterpret_cast<const int32_t*>(contiguous_data(a, lens));
    const bool bounded = max_kv_len && *max_kv_len < p.kv_capacity;
    const int64_t high = limits.max_kv_len = bounded ? *max_kv_len : p.kv_capacity;
    if (checked_in_place(a)) {
      readable_lens = p.kv_lens;
    } else if (const Readable<int32_t> values{a}) {
      for (int64_t i = 0; i < a.numel(); ++i)
        host_lens.push_back(a.dim == 1 ? values.at(i) : values.at(i / p.kv_heads, i % p.kv_heads));
      readable_lens = host_lens.data();
    }
    for (int64_t i = 0; readable_lens != nullptr && i < a.numel(); ++i)
      EFFOPS_CHECK(readable_lens[i] >= 0 && readable_lens[i] <= high, op, ": kv_lens: expected values in [0, ", high,
                   "] (", bounded ? "max_kv_len" : capacity_name, "), got ", readable_lens[i], " at index ", i);
  }

  // The problem as checks can read it.
  AttentionProblem readable(const AttentionOptions& options) const {
    AttentionProblem r = p;
    r.cu_q = cu_q.host();
    r.kv_lens = readable_lens;
    r.pages = table.readable;
    options.make_readable(r);
    return r;
  }
};

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lens,
                                           OptionalTensor cu_seqlens_q, OptionalTensor kv_starts, bool causal,
                                           int64_t window, int64_t num_sinks, OptionalTensor prefix_lens,
                                           OptionalTensor head_windows, OptionalTensor sink_logits, double softcap,
                                           std::optional<double> scale, std::optional<int64_t> max_q_len,
                                           std::optional<int64_t> max_kv_len) {
  const char* op = "paged_attention";
  const Backend backend(op, q);
  Cached in(backend, op, "k_pages", "v_pages", q, k_pages, v_pages, page_table, kv_lens, cu_seqlens_q, max_q_len,
            max_kv_len);
  const AttentionOptions options(op, in.q, in.p.batch, in.p.heads, in.p.kv_heads, std::nullopt, kv_starts, causal,
                                 window, num_sinks, prefix_lens, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, in.p.kv_capacity, in.capacity_name);
  options.apply(in.p);
  if (backend.checks_values()) check_pages(op, "page_table", in.readable(options), in.limits.pages);
  return run_attention(backend, in.q, in.p, in.limits);
}

// A sequence that is there has all its rows in the mask, and their keys.
void check_trees(const char* op, const AttentionProblem& p, int64_t rows) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < (p.lens_a_head ? p.kv_heads : 1); ++g) {
      const Sequence s = sequence_of(p, b, g);
      EFFOPS_CHECK(s.q_len <= rows, op, ": ancestors: expected at least ", s.q_len, " rows, those of sequence ", b,
                   ", got ", rows);
      EFFOPS_CHECK(s.kv_len == 0 || s.kv_len >= s.q_len, op,
                   ": kv_lens: expected 0 or at least the tree's T = ", s.q_len, ", got ", s.kv_len, " for sequence ",
                   b);
    }
}

std::tuple<Tensor, Tensor> tree_attention(Tensor q, Tensor k, Tensor v, Tensor ancestors, OptionalTensor depths,
                                          OptionalTensor kv_lens, OptionalTensor page_table,
                                          OptionalTensor cu_seqlens_q, OptionalTensor kv_starts, int64_t window,
                                          int64_t num_sinks, OptionalTensor head_windows, OptionalTensor sink_logits,
                                          double softcap, std::optional<double> scale, std::optional<int64_t> max_q_len,
                                          std::optional<int64_t> max_kv_len) {
  const char* op = "tree_attention";
  EFFOPS_CHECK(kv_lens || !page_table, op, ": kv_lens: expected a tensor beside page_table, got None");
  const Backend backend(op, q);
  Cached in(backend, op, "k", "v", q, k, v, page_table, kv_lens, cu_seqlens_q, max_q_len, max_kv_len);
  AttentionProblem& p = in.p;
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, false, window,
                                 num_sinks, std::nullopt, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, p.kv_capacity, in.capacity_name);
  const TreeMask mask(in.q, ancestors, depths, p, in.cu_q.host());
  in.limits.max_q_len = std::min(in.limits.max_q_len, mask.tokens());
  options.apply(p);
  if (backend.checks_values()) {
    AttentionProblem r = in.readable(options);
    check_trees(op, r, mask.tokens());
    r.tree = mask.readable();
    if (p.pages.given()) check_pages(op, "page_table", r, in.limits.pages);
  }
  p.tree = mask.get();
  return run_attention(backend, in.q, p, in.limits);
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, OptionalTensor kv_lens,
                                            OptionalTensor page_table, OptionalTensor kv_starts,
                                            OptionalTensor sink_logits, double softcap, std::optional<double> scale) {
  const char* op = "sparse_attention";
  EFFOPS_CHECK(kv_lens || !page_table, op, ": kv_lens: expected a tensor beside page_table, got None");
  const Backend backend(op, q);
  Cached in(backend, op, "k", "v", q, k, v, page_table, kv_lens, std::nullopt, std::nullopt, std::nullopt);
  AttentionProblem& p = in.p;
  EFFOPS_CHECK(p.q_len == 1, op, ": q: expected shape [B, T = 1, H, D], got ", in.q.shape());
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, false, 0, 0,
                                 std::nullopt, std::nullopt, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, p.kv_capacity, in.capacity_name);
  const Arg list(op, "indices", indices);
  SelectionArg selection(list, in.q, p);
  if (backend.checks_values()) selection.check(list, in.readable(options), in.limits.pages);
  options.apply(p);
  selection.apply(p);
  in.limits.max_kv_len = list.size(2);
  return run_attention(backend, in.q, p, in.limits);
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
}

}  // namespace effops::ops
