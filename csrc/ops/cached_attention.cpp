// paged_attention, tree_attention and sparse_attention: queries over a KV cache, dense or in pages.
#include "ops/cached.h"

namespace effops::ops {
namespace {

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lens,
                                           OptionalTensor cu_seqlens_q, OptionalTensor kv_starts, bool causal,
                                           int64_t window, int64_t num_sinks, OptionalTensor prefix_lens,
                                           OptionalTensor head_windows, OptionalTensor sink_logits, double softcap,
                                           std::optional<double> scale, std::optional<int64_t> max_q_len,
                                           std::optional<int64_t> max_kv_len) {
  const char* op = "paged_attention";
  const Backend backend(op, q);
  Cached in(backend, op, {"k_pages", "v_pages"}, q, k_pages, v_pages, page_table, kv_lens, cu_seqlens_q, max_q_len,
            max_kv_len);
  const AttentionOptions options(op, in.q, in.p.batch, in.p.heads, in.p.kv_heads, std::nullopt, kv_starts, causal,
                                 window, num_sinks, prefix_lens, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, in.p.kv_capacity, in.capacity_name);
  options.apply(in.p);
  if (backend.checks_values()) in.check_pages(options);
  return run_attention(backend, in.q, in.p, in.limits);
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
  Cached in(backend, op, {}, q, k, v, page_table, kv_lens, cu_seqlens_q, max_q_len, max_kv_len);
  AttentionProblem& p = in.p;
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, false, window,
                                 num_sinks, std::nullopt, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, p.kv_capacity, in.capacity_name);
  const TreeMask mask(in.q, ancestors, depths, p, in.cu_q.host());
  in.limits.max_q_len = std::min(in.limits.max_q_len, mask.tokens());
  options.apply(p);
  if (backend.checks_values()) in.check_trees(mask, options);
  p.tree = mask.get();
  return run_attention(backend, in.q, p, in.limits);
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, OptionalTensor kv_lens,
                                            OptionalTensor page_table, OptionalTensor kv_starts,
                                            OptionalTensor sink_logits, double softcap, std::optional<double> scale) {
  const char* op = "sparse_attention";
  EFFOPS_CHECK(kv_lens || !page_table, op, ": kv_lens: expected a tensor beside page_table, got None");
  const Backend backend(op, q);
  Cached in(backend, op, {}, q, k, v, page_table, kv_lens, std::nullopt, std::nullopt, std::nullopt);
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
