// paged_attention and tree_attention on the CPU: queries over a KV cache, dense or in pages.
#include "cpu/kernels.h"
#include "ops/attention.h"
#include "ops/threads.h"

namespace effops::ops {
namespace {

// q [B, T, H, D], or [N, H, D] with offsets; k and v [B, L, G, D], or [P, page, G, D] with a page table;
// kv_lens [B], or [B, G] beside a page table.
struct Cached {
  Arg q, k, v;
  Values<int32_t> cu_q;
  Tensor lens;
  AttentionProblem p;
  int64_t pages = 0;
  const char* capacity_name = "L";

  Cached(const char* op, const char* k_name, const char* v_name, const Tensor& q_, const Tensor& k_, const Tensor& v_,
         const OptionalTensor& page_table, const OptionalTensor& kv_lens, const OptionalTensor& cu_seqlens_q,
         std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len)
      : q(op, "q", q_), k(op, k_name, k_), v(op, v_name, v_), cu_q(op, "cu_seqlens_q", cu_seqlens_q, {"B + 1", -1}, q) {
    p.dtype = q.dtype();
    k.same_dtype(q).same_device(q);
    v.same_dtype(q).same_device(q);
    queries(op, cu_seqlens_q.has_value(), max_q_len);
    keys(op, page_table);
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
      return;
    }
    EFFOPS_CHECK(cu_q.count() > 0, op, ": cu_seqlens_q: expected shape [B + 1], got [0]");
    check_offsets(op, "cu_seqlens_q", cu_q, q.size(0), max_q_len, "max_q_len");
    p.batch = cu_q.count() - 1;
    p.cu_q = cu_q.get();
    p.q = view3(q, unconst(q.data()));
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
      const Arg table(op, "page_table", *page_table);
      p.pages = page_table_of(table, q, p.batch, p.kv_heads, k.size(1));
      p.kv_capacity *= table.size(table.dim - 1);
      pages = first;
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
    const int64_t high = bounded ? *max_kv_len : p.kv_capacity;
    for (int64_t i = 0; i < a.numel(); ++i)
      EFFOPS_CHECK(p.kv_lens[i] >= 0 && p.kv_lens[i] <= high, op, ": kv_lens: expected values in [0, ", high, "] (",
                   bounded ? "max_kv_len" : capacity_name, "), got ", p.kv_lens[i], " at index ", i);
  }

  std::tuple<Tensor, Tensor> run(const char* op) {
    if (p.pages.given()) check_pages(op, "page_table", p, pages);
    const bool ragged = p.cu_q != nullptr;
    Tensor out = empty(with_last(q, p.v_dim), q.type, q);
    Tensor lse = empty(std::vector<int64_t>(q.sizes, q.sizes + q.dim - 1), lse_type(p.dtype), q);
    const Arg out_arg(op, "out", out), lse_arg(op, "lse", lse);
    p.out = ragged ? view3(out_arg, out_arg.mutable_data()) : view4(out_arg, out_arg.mutable_data());
    p.lse = ragged ? rows2(lse_arg, lse_arg.mutable_data()) : rows3(lse_arg, lse_arg.mutable_data());
    if (ragged) clear_unowned(out_arg, lse_arg, p.cu_q[p.batch], p.dtype);
    cpu::kernels().attention(p, torch_threads());
    return {out, lse};
  }
};

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lens,
                                           OptionalTensor cu_seqlens_q, OptionalTensor kv_starts, bool causal,
                                           int64_t window, int64_t num_sinks, OptionalTensor prefix_lens,
                                           OptionalTensor head_windows, OptionalTensor sink_logits, double softcap,
                                           std::optional<double> scale, std::optional<int64_t> max_q_len,
                                           std::optional<int64_t> max_kv_len) {
  const char* op = "paged_attention";
  Cached in(op, "k_pages", "v_pages", q, k_pages, v_pages, page_table, kv_lens, cu_seqlens_q, max_q_len, max_kv_len);
  const AttentionOptions options(op, in.q, in.p.batch, in.p.heads, in.p.kv_heads, std::nullopt, kv_starts, causal,
                                 window, num_sinks, prefix_lens, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, in.p.kv_capacity, in.capacity_name);
  options.apply(in.p);
  return in.run(op);
}

std::tuple<Tensor, Tensor> tree_attention(Tensor q, Tensor k, Tensor v, Tensor ancestors, OptionalTensor depths,
                                          OptionalTensor kv_lens, OptionalTensor page_table,
                                          OptionalTensor cu_seqlens_q, OptionalTensor kv_starts, int64_t window,
                                          int64_t num_sinks, OptionalTensor head_windows, OptionalTensor sink_logits,
                                          double softcap, std::optional<double> scale, std::optional<int64_t> max_q_len,
                                          std::optional<int64_t> max_kv_len) {
  const char* op = "tree_attention";
  EFFOPS_CHECK(kv_lens || !page_table, op, ": kv_lens: expected a tensor beside page_table, got None");
  Cached in(op, "k", "v", q, k, v, page_table, kv_lens, cu_seqlens_q, max_q_len, max_kv_len);
  AttentionProblem& p = in.p;
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, false, window,
                                 num_sinks, std::nullopt, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, p.kv_capacity, in.capacity_name);
  const TreeMask mask(in.q, ancestors, depths, p);
  options.apply(p);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < (p.lens_a_head ? p.kv_heads : 1); ++g) {
      const Sequence s = sequence_of(p, b, g);
      EFFOPS_CHECK(s.q_len <= mask.tokens(), op, ": ancestors: expected at least ", s.q_len,
                   " rows, those of sequence ", b, ", got ", mask.tokens());
      EFFOPS_CHECK(s.kv_len == 0 || s.kv_len >= s.q_len, op,
                   ": kv_lens: expected 0 or at least the tree's T = ", s.q_len, ", got ", s.kv_len, " for sequence ",
                   b);
    }
  p.tree = mask.get();
  return in.run(op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
}

}  // namespace effops::ops
