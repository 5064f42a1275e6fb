#include <bit>

#include "ops/attention.h"

namespace effops::ops {

TreeMask::TreeMask(const Arg& q, const Tensor& ancestors, const OptionalTensor& depths, const AttentionProblem& p,
                   const int32_t* cu_q)
    : ancestors_(ancestors) {
  const char* op = q.op;
  const Arg a(op, "ancestors", ancestors);
  a.is(aoti_torch_dtype_int64(), "int64").same_device(q);
  a.rank(3, "[B or 1, T, ceil(T / 64)]");
  const int64_t tokens = tree_.tokens = p.cu_q ? a.size(1) : p.q_len;
  auto rows_of = [&](const Arg& x) {
    EFFOPS_CHECK(x.size(0) == p.batch || x.size(0) == 1, op, ": ", x.name, ": expected B = ", p.batch,
                 " or 1 in the first dimension, got shape ", x.shape());
    return x.size(0) == 1 ? 0 : 1;
  };
  tree_.words = (tokens + 63) / 64;
  check_shape(a, {{"B or 1", -1}, {"T", tokens}, {"ceil(T / 64)", tree_.words}});
  tree_.ancestors_batch = rows_of(a) * tokens * tree_.words;
  tree_.ancestors = reinterpret_cast<const uint64_t*>(contiguous_data(a, ancestors_));
  if (tree_.ancestors == nullptr) tree_.ancestors = reinterpret_cast<const uint64_t*>(&tree_);  // no row: never read
  readable_ = tree_;
  if (depths) {
    const Arg d(op, "depths", *depths);
    d.is(type_int32(), "int32").same_device(q);
    check_shape(d, {{"B or 1", -1}, {"T", tokens}});
    tree_.depths_batch = readable_.depths_batch = rows_of(d) * tokens;
    depths_ = *depths;
    tree_.depths = readable_.depths = reinterpret_cast<const int32_t*>(contiguous_data(d, *depths_));
    if (checks_values() && !checked_in_place(d)) copy_depths(Readable<int32_t>(d), d.size(0));
    return;
  }
  if (!checks_values()) return;
  count_bits(Readable<int64_t>(a), p.cu_q ? p.batch : a.size(0), cu_q);
  if (!on_device()) tree_ = readable_;  // device kernels count for themselves
}

void TreeMask::copy_depths(const Readable<int32_t>& depths, int64_t rows) {
  for (int64_t i = 0; i < rows * tree_.tokens; ++i)
    host_depths_.push_back(depths.at(i / tree_.tokens, i % tree_.tokens));
  readable_.depths = host_depths_.data();
}

void TreeMask::count_bits(const Readable<int64_t>& ancestors, int64_t rows, const int32_t* cu_q) {
  const bool shared = tree_.ancestors_batch == 0;
  host_depths_.resize(rows * tree_.tokens + 1);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t own = cu_q ? std::min<int64_t>(cu_q[b + 1] - cu_q[b], tree_.tokens) : tree_.tokens;
    for (int64_t i = 0; i < own; ++i) {
      int32_t count = -1;
      for (int64_t w = 0; w * 64 < own; ++w) {
        const auto bits = static_cast<uint64_t>(ancestors.at(shared ? 0 : b, i, w));
        count += std::popcount(own - w * 64 < 64 ? bits & ((uint64_t(1) << (own - w * 64)) - 1) : bits);
      }
      host_depths_[b * tree_.tokens + i] = count;
    }
  }
  readable_.depths = host_depths_.data();
  readable_.depths_batch = rows == 1 ? 0 : tree_.tokens;
}

}  // namespace effops::ops
