// cascade_attention: the levels of a tree of shared prefixes one after the other, joined by their log-sum-exp.
#include "ops/cached.h"

namespace effops::ops {
namespace {

using Tensors = std::vector<Tensor>;

// The arguments of one level, by the names that errors give them.
struct LevelNames {
  std::string k, v, page_table, kv_lens, cu_q;

  explicit LevelNames(size_t i) {
    const std::string at = "[" + std::to_string(i) + "]";
    k = "k" + at;
    v = "v" + at;
    page_table = "page_tables" + at;
    kv_lens = "lens" + at;
    cu_q = "group_indptr" + at;
  }
  CachedNames get() const { return {k.c_str(), v.c_str(), page_table.c_str(), kv_lens.c_str(), cu_q.c_str()}; }
};

void check_counts(const char* op, const Tensors& k, const Tensors& v, const Tensors& lens, const Tensors& group_indptr,
                  const Tensors& page_tables) {
  EFFOPS_CHECK(!k.empty(), op, ": k: expected one level or more, got none");
  auto check = [&](const char* name, const Tensors& list) {
    EFFOPS_CHECK(list.size() == k.size(), op, ": ", name, ": expected a tensor for each of ", k.size(), " levels, got ",
                 list.size());
  };
  check("v", v);
  check("lens", lens);
  check("group_indptr", group_indptr);
  if (!page_tables.empty()) check("page_tables", page_tables);
}

// An empty one-dimensional tensor says that a level is dense.
OptionalTensor table_of(const Tensors& page_tables, size_t i) {
  if (page_tables.empty()) return std::nullopt;
  const Tensor& t = page_tables[i];
  return t.dim() == 1 && t.numel() == 0 ? std::nullopt : OptionalTensor(t);
}

// Results of all levels side by side in the compute type, and what joins them.
struct Parts {
  Tensor outs, lses;
  MergeProblem merge;
  char *out_data, *lse_data;

  Parts(const Arg& q, int64_t levels, const AttentionProblem& p)
      : outs(empty({levels, q.size(0), p.heads, p.v_dim}, lse_type(p.dtype), q)),
        lses(empty({levels, q.size(0), p.heads}, lse_type(p.dtype), q)) {
    const Arg o(q.op, "out", outs), l(q.op, "lse", lses);
    out_data = o.mutable_data();
    lse_data = l.mutable_data();
    merge.dtype = o.dtype();
    merge.out_dtype = p.dtype;
    merge.parts = levels;
    merge.rows = q.size(0) * p.heads;
    merge.dim = p.v_dim;
    merge.outs = out_data;
    merge.lses = lse_data;
  }

  void place(AttentionProblem& p, int64_t level) const {
    const int64_t bytes = size_of(merge.dtype), at = level * merge.rows;
    p.wide_out = true;
    p.out = {out_data + at * merge.dim * bytes, 0, p.heads * merge.dim, merge.dim, 1};
    p.lse = {lse_data + at * bytes, 0, p.heads, 1};
  }

  std::tuple<Tensor, Tensor> join(const Backend& backend, const Arg& q) {
    Tensor out = empty(with_last(q, merge.dim), q.type, q);
    Tensor lse = empty({q.size(0), q.size(1)}, type_of(merge.dtype), q);
    merge.out = Arg(q.op, "out", out).mutable_data();
    merge.lse = Arg(q.op, "lse", lse).mutable_data();
    backend.run(&cpu::Kernels::merge_states, &DeviceLibrary::merge_states, merge);
    return {out, lse};
  }
};

std::tuple<Tensor, Tensor> cascade_attention(Tensor q, Tensors k, Tensors v, Tensors lens, Tensors group_indptr,
                                             Tensors page_tables, bool causal, OptionalTensor ancestors,
                                             OptionalTensor depths, OptionalTensor sink_logits, double softcap,
                                             std::optional<double> scale) {
  const char* op = "cascade_attention";
  const Backend backend(op, q);
  check_counts(op, k, v, lens, group_indptr, page_tables);
  EFFOPS_CHECK(!causal || !ancestors, op, ": ancestors: expected None beside causal, got a tensor");
  EFFOPS_CHECK(ancestors || !depths, op, ": depths: expected None without ancestors, got a tensor");
  const Arg queries(op, "q", q);
  const int64_t levels = k.size();
  std::optional<Parts> parts;
  for (int64_t i = 0; i < levels; ++i) {
    const bool last = i == levels - 1;  // it has the mask, and the sinks
    const LevelNames names(i);
    Cached in(backend, op, names.get(), q, k[i], v[i], table_of(page_tables, i), lens[i], group_indptr[i], std::nullopt,
              std::nullopt);
    AttentionProblem& p = in.p;
    const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, std::nullopt, causal && last,
                                   0, 0, std::nullopt, std::nullopt, last ? sink_logits : std::nullopt, softcap, scale);
    options.apply(p);
    std::optional<TreeMask> mask;
    if (last && ancestors) {
      mask.emplace(in.q, *ancestors, depths, p, in.cu_q.host());
      in.limits.max_q_len = std::min(in.limits.max_q_len, mask->tokens());
      if (backend.checks_values()) in.check_trees(*mask, options);
      p.tree = mask->get();
    } else if (backend.checks_values() && p.pages.given()) {
      in.check_pages(options);
    }
    if (levels == 1) return run_attention(backend, in.q, p, in.limits);
    if (!parts) parts.emplace(queries, levels, p);
    EFFOPS_CHECK(p.v_dim == parts->merge.dim, op, ": v[", i, "]: expected Dv = ", parts->merge.dim, ", as v[0], got ",
                 p.v_dim);
    parts->place(p, i);
    run_attention_into(backend, in.q, p, in.limits);
  }
  return parts->join(backend, queries);
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("cascade_attention", TORCH_BOX(&cascade_attention)); }

}  // namespace effops::ops
