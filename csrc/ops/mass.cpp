// accumulate_mass: the attention that every key of a cache has had.
#include "common/mass_problem.h"
#include "ops/attention.h"

namespace effops::ops {
namespace {

// Reads nothing that `mass` does not cover: k [B, L, G, D], or [P, page, G, D] beside a page table.
void accumulate_mass(Tensor mass, Tensor q, Tensor k, Tensor lse, OptionalTensor kv_lens, OptionalTensor kv_starts,
                     bool causal, int64_t window, int64_t num_sinks, double softcap, std::optional<double> scale,
                     OptionalTensor page_table) {
  const char* op = "accumulate_mass";
  EFFOPS_CHECK(kv_lens || !page_table, op, ": kv_lens: expected a tensor beside page_table, got None");
  const Backend backend(op, mass);
  const Arg to(op, "mass", mass), query(op, "q", q), keys(op, "k", k), rows(op, "lse", lse);
  MassProblem m;
  AttentionProblem& p = m.attention;
  p.dtype = query.dtype();
  check_attention_dtype(backend, query);
  query.rank(4, "[B, T, H, D]").same_device(to);
  keys.same_dtype(query).same_device(to).rank(4, page_table ? "[P, page, G, D]" : "[B, L, G, D]");
  p.batch = query.size(0);
  p.q_len = query.size(1);
  p.heads = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = keys.size(2);
  EFFOPS_CHECK(p.head_dim > 0, op, ": q: expected D >= 1, got shape ", query.shape());
  EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op,
               ": k: expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
  AttentionLimits limits;
  PageTableArg table;
  p.kv_capacity = keys.size(1);
  if (page_table) {
    check_shape(keys, {{"P", -1}, {"page", -1}, {"G", -1}, {"D", p.head_dim}});
    const Arg entries(op, "page_table", *page_table);
    table = PageTableArg(entries, to, p.batch, p.kv_heads, keys.size(1));
    p.pages = table.pages;
    p.kv_capacity *= entries.size(entries.dim - 1);
    limits.pages = keys.size(0);
  } else {
    check_shape(keys, {{"B", p.batch}, {"L", -1}, {"G", -1}, {"D", p.head_dim}});
  }
  const char* kept = p.dtype == DType::f64 ? "float64" : "float32";
  rows.is(lse_type(p.dtype), kept).same_device(to);
  check_shape(rows, {{"B", p.batch}, {"T", p.q_len}, {"H", p.heads}});
  to.is(lse_type(p.dtype), kept);
  check_shape(to, {{"B", p.batch}, {"G", p.kv_heads}, {page_table ? "entries * page" : "L", p.kv_capacity}});
  const AttentionOptions options(op, query, p.batch, p.heads, p.kv_heads, kv_lens, kv_starts, causal, window, num_sinks,
                                 std::nullopt, std::nullopt, std::nullopt, softcap, scale);
  const char* capacity = page_table ? "entries * page" : "L";
  check_range(op, "kv_lens", options.kv_lens, 0, p.kv_capacity, capacity);
  check_range(op, "kv_starts", options.kv_starts, 0, p.kv_capacity, capacity);
  options.apply(p);
  if (page_table && backend.checks_values()) {
    AttentionProblem readable = p;
    readable.pages = table.readable;
    readable.kv_lens = options.kv_lens.host();
    options.make_readable(readable);
    check_pages(op, "page_table", readable, limits.pages);
  }
  p.q = view4(query, unconst(query.data()));
  p.k = view4(keys, unconst(keys.data()));
  p.lse = rows3(rows, unconst(rows.data()));
  m.mass = {to.mutable_data(), to.stride(0), to.stride(2), to.stride(1)};
  if (backend.device()) {
    limits.max_q_len = p.q_len;
    limits.max_kv_len = p.kv_capacity;
    backend.launch(&DeviceLibrary::attention_mass, m, limits);
  } else {
    cpu::kernels().attention_mass(m, torch_threads());
  }
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("accumulate_mass", TORCH_BOX(&accumulate_mass)); }

}  // namespace effops::ops
