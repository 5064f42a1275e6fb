// One attention problem with its data, and what attention means, as plain double loops.
#pragma once

#include <string>
#include <vector>

#include "common/attention_problem.h"
#include "tensor.h"

namespace effops::test {

// Empty vectors are arguments not given. A ragged case has cu_q and cu_k, and q_len and capacity are then the
// numbers of rows in memory.
struct AttentionCase {
  int64_t batch = 1, q_len = 1, capacity = 1, heads = 1, kv_heads = 1, head_dim = 8, v_dim = 8;
  std::vector<int32_t> lens = {}, starts = {}, prefixes = {}, head_windows = {}, cu_q = {}, cu_k = {};
  bool causal = false, sink_logits = false;
  int64_t window = 0, sinks = 0;
  double softcap = 0;
  int64_t page = 0;   // tokens a page; 0: dense
  bool tree = false;  // the last q_len keys are under random masks, and queries at random depths
  Layout q = Layout::contiguous, kv = Layout::contiguous, out = Layout::contiguous;

  std::string text() const;  // for messages
};

// Small sizes of everything at random.
AttentionCase random_attention_case(Random& random);

struct AttentionReference {
  std::vector<double> out, lse;           // [batch, q_len, heads, v_dim], [batch, q_len, heads]
  std::vector<double> dq, dk, dv, dsink;  // where gradients were asked; dsink [sequences, heads]
  double largest_gradient = 0;
};

// The case in memory: NaN wherever nothing may be read, inputs write-protected.
class AttentionData {
 public:
  AttentionData(const AttentionCase& c, DType dtype, uint32_t seed);

  // Fills out and lse by definition.
  AttentionReference forward() const;
  // Adds gradients to forward()'s result, from the out and lse in memory, as the kernel has them.
  void backward(const Tensor& d_out, const Tensor& d_lse, AttentionReference& r) const;
  // What every key has of the attention weights that follow from the lse in memory: [batch, capacity, kv_heads].
  std::vector<double> mass() const;

  AttentionProblem problem;
  Tensor q, k, v, out, lse;

 private:
  struct Row {                  // a query of a head
    int64_t sequence, b, t, h;  // b: batch index in memory
    int64_t first_key, kv_len, kv_start, position;
  };
  template <class F>
  void for_each_row(F&& body) const;
  bool allowed(const Row& row, int64_t j) const;
  struct Place {
    int64_t b, j;
  };
  Place place(int64_t b, int64_t j) const;  // of a key in the memory of k and v
  double product(const Row& row, int64_t j) const;
  double score(double product) const;

  AttentionCase case_;
  List<int32_t> lens_, starts_, prefixes_, head_windows_, cu_q_, cu_k_, table_, depths_;
  List<uint64_t> ancestors_;
  List<float> sink_logits_;
};

}  // namespace effops::test
