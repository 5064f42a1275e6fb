// Checks and problem descriptors shared by the attention ops of all backends.
#pragma once

#include "common/attention_problem.h"
#include "ops/backend.h"
#include "ops/layer.h"

namespace effops::ops {

using device::AttentionLimits;

// The options every attention op takes, resolved. Owns copies of strided index arguments.
struct AttentionOptions {
  AttentionOptions(const char* op, const Arg& q, int64_t batch, int64_t heads, int64_t kv_heads,
                   const OptionalTensor& kv_lens, const OptionalTensor& kv_starts, bool causal, int64_t window,
                   int64_t num_sinks, const OptionalTensor& prefix_lens, const OptionalTensor& head_windows,
                   const OptionalTensor& sink_logits, double softcap, std::optional<double> scale);

  void apply(AttentionProblem& p) const;
  // Points the index arguments of p to where checks can read them.
  void make_readable(AttentionProblem& p) const;

  Values<int32_t> kv_lens, kv_starts, prefix_lens, head_windows;
  Values<float> sink_logits;
  bool causal;
  int64_t window, num_sinks;
  double softcap, scale;
};

// The ancestors and depths of a tree, [B or 1, T, W] and [B or 1, T], as the problem reads them. Owns
// copies, and for the processor depths where none were given: the row's bits below its sequence's T, less one.
class TreeMask {
 public:
  // p.batch, p.q_len and p.cu_q must stand; cu_q: p.cu_q as the host can read it.
  TreeMask(const Arg& q, const Tensor& ancestors, const OptionalTensor& depths, const AttentionProblem& p,
           const int32_t* cu_q);

  Tree get() const { return tree_; }
  Tree readable() const { return readable_; }  // depths, for checks
  int64_t tokens() const { return tree_.tokens; }

 private:
  void copy_depths(const Readable<int32_t>& depths, int64_t rows);
  void count_bits(const Readable<int64_t>& ancestors, int64_t rows, const int32_t* cu_q);

  Tensor ancestors_;
  OptionalTensor depths_;
  std::vector<int32_t> host_depths_;
  Tree tree_, readable_;
};

// int32 [B, entries], or [B, G, entries], of pages of `page` tokens.
struct PageTableArg {
  PageTableArg() = default;
  PageTableArg(const Arg& table, const Arg& like, int64_t batch, int64_t kv_heads, int64_t page);

  PageTable pages, readable;  // readable: for checks; without data where there are to be none

 private:
  Readable<int32_t> values_;
};

// int32 [B, 1 or G or H, S]: the tokens that each list's heads attend to; -1 names none.
class SelectionArg {
 public:
  // p.batch, p.heads and p.kv_heads must stand.
  SelectionArg(const Arg& indices, const Arg& like, const AttentionProblem& p);
  // Everything in p can be read. For the processor gaps are closed.
  void check(const Arg& indices, const AttentionProblem& p, int64_t pages);
  // A list for each query head makes it a KV head of its own.
  void apply(AttentionProblem& p) const;

 private:
  Selection selection_;
  int64_t lists_ = 1;
  std::vector<int32_t> kept_, counts_;
};

// Entries of a page table that a call will read name pages below `count`. Everything in p can be read.
void check_pages(const char* op, const char* name, const AttentionProblem& p, int64_t count);

// Offsets of a ragged batch: ascending from 0, at most `rows`; lengths up to `longest`.
void check_offsets(const char* op, const char* name, const Values<int32_t>& offsets, int64_t rows,
                   std::optional<int64_t> longest, const char* longest_name);

void check_attention_dtype(const Backend& backend, const Arg& q);
int32_t lse_type(DType t);

// Allocates out and lse, and runs p.
std::tuple<Tensor, Tensor> run_attention(const Backend& backend, const Arg& q, AttentionProblem& p,
                                         const AttentionLimits& limits);
// The same into p.out and p.lse, where they are: rows in line.
void run_attention_into(const Backend& backend, const Arg& q, const AttentionProblem& p, const AttentionLimits& limits);
// The gradients' memory is zero; see `zeros`.
void run_attention_backward(const Backend& backend, const Arg& q, const AttentionProblem& p,
                            const AttentionGradients& g, const AttentionLimits& limits);
Tensor zeros(const Arg& like, const char* name, const std::vector<int64_t>& sizes, int32_t type, char*& data);

inline char* unconst(const char* p) { return const_cast<char*>(p); }

TensorView4 view4(const Arg& a, char* data);  // [B, T, H, D]
TensorView4 view3(const Arg& a, char* data);  // [N, H, D]
RowView rows3(const Arg& a, char* data);      // [B, T, H]
RowView rows2(const Arg& a, char* data);      // [N, H]

}  // namespace effops::ops
