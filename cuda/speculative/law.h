// Laws over the vocabulary that a block reads together. Sums and decisions are in double.
#pragma once

#include "common/verify.h"
#include "primitives/element.h"
#include "sampling/find.h"

namespace effops::device {

struct VerifyParams {
  VerifyProblem p;
  char* workspace;
  int64_t* flaw;
};

inline constexpr int kMostLawThreads = 1024;
inline constexpr int kLawSharedBytes = kWarp * sizeof(double);

inline int law_threads(const VerifyProblem& p) { return p.vocab <= 4096 ? 128 : kMostLawThreads; }

__device__ inline double* law_scratch() { return reinterpret_cast<double*>(shared_memory()); }

// f(0) + … + f(count - 1).
template <class F>
__device__ double block_sum(int64_t count, F&& f) {
  double sum = 0;
  for (int64_t v = threadIdx.x; v < count; v += blockDim.x) sum += f(v);
  return reduce_block(sum, Sum(), 0.0, law_scratch());
}

// Weights, in a row of the call's or in this block's own memory, and what they sum to.
struct Law {
  const float* row = nullptr;
  int64_t stride = 1;
  const double* own = nullptr;
  double total = 0;

  __device__ double weight(int64_t v) const { return own != nullptr ? own[v] : static_cast<double>(row[v * stride]); }
  __device__ double of(int64_t v) const { return weight(v) / total; }
};

// The row of node i of sequence b. One with negative entries or no positive sum is reported.
__device__ inline Law load_law(const VerifyParams& a, bool draft, int64_t b, int64_t i) {
  const Strided<float>& rows = draft ? a.p.draft_probs : a.p.target_probs;
  Law law{rows.data + b * rows.stride[0] + i * rows.stride[1], rows.stride[2], nullptr, 0};
  law.total = block_sum(a.p.vocab, [&](int64_t v) {
    const double w = law.weight(v);
    return w >= 0 ? w : static_cast<double>(NAN);
  });
  if (!(law.total > 0 && law.total < static_cast<double>(INFINITY)) && a.flaw != nullptr && threadIdx.x == 0)
    atomicMin(reinterpret_cast<unsigned long long*>(a.flaw),
              static_cast<unsigned long long>(LawFlaw{b * a.p.tokens + i, draft}.code()));
  return law;
}

// Inverse CDF in id order.
__device__ inline int64_t draw(const VerifyParams& a, const Law& law, double uniform) {
  return find_sum(a.p.vocab, uniform * law.total, law_scratch(), [&](int64_t v) { return law.weight(v); });
}

}  // namespace effops::device
