// Queries over a KV cache, dense or in pages: what the ops on caches check, and the problem they ask of the engine.
#pragma once

#include "ops/attention.h"

namespace effops::ops {

// How an op calls its arguments.
struct CachedNames {
  const char *k = "k", *v = "v", *page_table = "page_table", *kv_lens = "kv_lens", *cu_q = "cu_seqlens_q";
};

// q [B, T, H, D], or [N, H, D] with offsets; k and v [B, L, G, D], or [P, page, G, D] with a page table;
// kv_lens [B], or [B, G] beside a page table.
struct Cached {
  Cached(const Backend& backend, const char* op, const CachedNames& names, const Tensor& q, const Tensor& k,
         const Tensor& v, const OptionalTensor& page_table, const OptionalTensor& kv_lens,
         const OptionalTensor& cu_seqlens_q, std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len);

  // The problem as checks can read it.
  AttentionProblem readable(const AttentionOptions& options) const;
  // The mask of trees in the problem, once options are applied.
  void check_trees(const TreeMask& mask, const AttentionOptions& options) const;
  void check_pages(const AttentionOptions& options) const;

  Arg q, k, v;
  Values<int32_t> cu_q;
  AttentionProblem p;
  AttentionLimits limits;
  const char* capacity_name = "L";

 private:
  void queries(bool ragged, std::optional<int64_t> max_q_len);
  void keys(const OptionalTensor& page_table);
  void lengths(const Tensor& kv_lens, bool paged, std::optional<int64_t> max_kv_len);

  const char* op_;
  CachedNames names_;
  PageTableArg table_;
  Tensor lens_;
  const int32_t* readable_lens_ = nullptr;
  std::vector<int32_t> host_lens_;
};

}  // namespace effops::ops
