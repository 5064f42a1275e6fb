// Checks and problem descriptors shared by the attention ops of all backends.
#pragma once

#include "common/attention_problem.h"
#include "ops/layer.h"

namespace effops::ops {

// The options every attention op takes, resolved. Owns copies of strided index arguments.
struct AttentionOptions {
  AttentionOptions(const char* op, const Arg& q, int64_t batch, int64_t heads, int64_t kv_heads,
                   const OptionalTensor& kv_lens, const OptionalTensor& kv_starts, bool causal, int64_t window,
                   int64_t num_sinks, const OptionalTensor& prefix_lens, const OptionalTensor& head_windows,
                   const OptionalTensor& sink_logits, double softcap, std::optional<double> scale);

  void apply(AttentionProblem& p) const;

  Values<int32_t> kv_lens, kv_starts, prefix_lens, head_windows;
  Values<float> sink_logits;
  bool causal;
  int64_t window, num_sinks;
  double softcap, scale;
};

// The ancestors and depths of a tree, [B or 1, T, W] and [B or 1, T], as the problem reads them. Owns
// copies, and depths where none were given: the row's bits below its sequence's T, less one.
class TreeMask {
 public:
  // p.batch, p.q_len and p.cu_q must stand.
  TreeMask(const Arg& q, const Tensor& ancestors, const OptionalTensor& depths, const AttentionProblem& p);

  Tree get() const { return tree_; }
  int64_t tokens() const { return tokens_; }

 private:
  Tensor ancestors_, depths_;
  std::vector<int32_t> counted_;
  int64_t tokens_ = 0;
  Tree tree_;
};

// Entries of a page table that a call will read name pages below `count`.
void check_pages(const char* op, const char* name, const AttentionProblem& p, int64_t count);

// int32 [B, entries], or [B, G, entries], of pages of `page` tokens.
PageTable page_table_of(const Arg& table, const Arg& like, int64_t batch, int64_t kv_heads, int64_t page);

// Offsets of a ragged batch: ascending from 0, at most `rows`; lengths up to `longest`.
void check_offsets(const char* op, const char* name, const Values<int32_t>& cu, int64_t rows,
                   std::optional<int64_t> longest, const char* longest_name);

int32_t lse_type(DType t);

// Rows of a ragged batch past the last offset belong to no sequence: out 0, lse -inf.
void clear_unowned(const Arg& out, const Arg& lse, int64_t from, DType dtype);

inline char* unconst(const char* p) { return const_cast<char*>(p); }

TensorView4 view4(const Arg& a, char* data);  // [B, T, H, D]
TensorView4 view3(const Arg& a, char* data);  // [N, H, D]
RowView rows3(const Arg& a, char* data);      // [B, T, H]
RowView rows2(const Arg& a, char* data);      // [N, H]

}  // namespace effops::ops
