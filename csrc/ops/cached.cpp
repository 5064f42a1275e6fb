#include "ops/cached.h"

namespace effops::ops {

Cached::Cached(const Backend& backend, const char* op, const CachedNames& names, const Tensor& q_, const Tensor& k_,
               const Tensor& v_, const OptionalTensor& page_table, const OptionalTensor& kv_lens,
               const OptionalTensor& cu_seqlens_q, std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len)
    : q(op, "q", q_),
      k(op, names.k, k_),
      v(op, names.v, v_),
      cu_q(op, names.cu_q, cu_seqlens_q, {"B + 1", -1}, q),
      op_(op),
      names_(names) {
  p.dtype = q.dtype();
  check_attention_dtype(backend, q);
  k.same_dtype(q).same_device(q);
  v.same_dtype(q).same_device(q);
  queries(cu_seqlens_q.has_value(), max_q_len);
  keys(page_table);
  limits.max_kv_len = p.kv_capacity;
  if (kv_lens) lengths(*kv_lens, page_table.has_value(), max_kv_len);
}

void Cached::queries(bool ragged, std::optional<int64_t> max_q_len) {
  q.rank(ragged ? 3 : 4, ragged ? "[N, H, D]" : "[B, T, H, D]");
  p.heads = q.size(q.dim - 2);
  p.head_dim = q.size(q.dim - 1);
  EFFOPS_CHECK(p.head_dim > 0, op_, ": q: expected D >= 1, got shape ", q.shape());
  if (!ragged) {
    p.batch = q.size(0);
    p.q_len = q.size(1);
    p.q = view4(q, unconst(q.data()));
    limits.max_q_len = p.q_len;
    return;
  }
  EFFOPS_CHECK(cu_q.count() > 0, op_, ": ", names_.cu_q, ": expected shape [B + 1], got [0]");
  check_offsets(op_, names_.cu_q, cu_q, q.size(0), max_q_len, "max_q_len");
  p.batch = cu_q.count() - 1;
  p.cu_q = cu_q.get();
  p.q = view3(q, unconst(q.data()));
  limits.q_rows = q.size(0);
  limits.max_q_len = std::min(q.size(0), max_q_len.value_or(q.size(0)));
}

void Cached::keys(const OptionalTensor& page_table) {
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
  EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op_, ": ", k.name,
               ": expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
  p.kv_capacity = k.size(1);
  if (page_table) {
    const Arg entries(op_, names_.page_table, *page_table);
    table_ = PageTableArg(entries, q, p.batch, p.kv_heads, k.size(1));
    p.pages = table_.pages;
    p.kv_capacity *= entries.size(entries.dim - 1);
    limits.pages = first;
    capacity_name = "entries * page";
  }
  p.k = view4(k, unconst(k.data()));
  p.v = view4(v, unconst(v.data()));
}

void Cached::lengths(const Tensor& kv_lens, bool paged, std::optional<int64_t> max_kv_len) {
  const Arg a(op_, names_.kv_lens, kv_lens);
  a.is(type_int32(), "int32").same_device(q);
  p.lens_a_head = paged && a.dim == 2;
  if (p.lens_a_head) {
    check_shape(a, {{"B", p.batch}, {"G", p.kv_heads}});
  } else {
    check_shape(a, {{"B", p.batch}});
  }
  lens_ = kv_lens;
  p.kv_lens = reinterpret_cast<const int32_t*>(contiguous_data(a, lens_));
  const bool bounded = max_kv_len && *max_kv_len < p.kv_capacity;
  const int64_t high = limits.max_kv_len = bounded ? *max_kv_len : p.kv_capacity;
  if (checked_in_place(a)) {
    readable_lens_ = p.kv_lens;
  } else if (const Readable<int32_t> values{a}) {
    for (int64_t i = 0; i < a.numel(); ++i)
      host_lens_.push_back(a.dim == 1 ? values.at(i) : values.at(i / p.kv_heads, i % p.kv_heads));
    readable_lens_ = host_lens_.data();
  }
  for (int64_t i = 0; readable_lens_ != nullptr && i < a.numel(); ++i)
    EFFOPS_CHECK(readable_lens_[i] >= 0 && readable_lens_[i] <= high, op_, ": ", names_.kv_lens,
                 ": expected values in [0, ", high, "] (", bounded ? "max_kv_len" : capacity_name, "), got ",
                 readable_lens_[i], " at index ", i);
}

AttentionProblem Cached::readable(const AttentionOptions& options) const {
  AttentionProblem r = p;
  r.cu_q = cu_q.host();
  r.kv_lens = readable_lens_;
  r.pages = table_.readable;
  options.make_readable(r);
  return r;
}

// A sequence that is there has all its rows in the mask, and their keys.
void Cached::check_trees(const TreeMask& mask, const AttentionOptions& options) const {
  AttentionProblem r = readable(options);
  for (int64_t b = 0; b < r.batch; ++b)
    for (int64_t g = 0; g < (r.lens_a_head ? r.kv_heads : 1); ++g) {
      const Sequence s = sequence_of(r, b, g);
      EFFOPS_CHECK(s.q_len <= mask.tokens(), op_, ": ancestors: expected at least ", s.q_len,
                   " rows, those of sequence ", b, ", got ", mask.tokens());
      EFFOPS_CHECK(s.kv_len == 0 || s.kv_len >= s.q_len, op_, ": ", names_.kv_lens,
                   ": expected 0 or at least the tree's T = ", s.q_len, ", got ", s.kv_len, " for sequence ", b);
    }
  r.tree = mask.readable();
  if (p.pages.given()) ops::check_pages(op_, names_.page_table, r, limits.pages);
}

void Cached::check_pages(const AttentionOptions& options) const {
  ops::check_pages(op_, names_.page_table, readable(options), limits.pages);
}

}  // namespace effops::ops
