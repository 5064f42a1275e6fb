// One sequence's way down its token tree: which nodes it has accepted, and where they go.
#pragma once

#include "common/tree.h"
#include "common/verify.h"
#include "primitives/element.h"

namespace effops::device {

struct Walk {
  const VerifyProblem& p;
  int64_t b;
  int32_t* nodes;
  int64_t at = 0;
  int32_t count = 0;

  __device__ Walk(const VerifyProblem& problem, int64_t sequence)
      : p(problem), b(sequence), nodes(p.nodes + b * p.tokens) {}

  __device__ bool absent() const { return p.tokens == 0 || parent(0) == kTreePadding; }
  __device__ int64_t parent(int64_t i) const { return p.parents.of(b, i); }
  __device__ int64_t token(int64_t i) const { return p.draft_tokens.at(b, i); }

  // The first node from `from` on that is a child of `at` and wanted(node), else p.tokens. The lanes of a warp look
  // together.
  template <class Wanted>
  __device__ int64_t next_child(int64_t from, Wanted&& wanted) const {
    for (; from < p.tokens; from += kWarp) {
      const int64_t i = from + lane_index();
      const unsigned hits = __ballot_sync(kAllLanes, i < p.tokens && parent(i) == at && wanted(i));
      if (hits != 0) return from + __ffs(hits) - 1;
    }
    return p.tokens;
  }

  // All threads of a sequence call these; `first` is the one that writes.
  __device__ void accept(int64_t i, bool first) {
    if (first) nodes[count] = static_cast<int32_t>(i);
    ++count;
    at = i;
  }
  __device__ void finish(int64_t next_token, int thread, int threads) {
    for (int64_t i = count + thread; i < p.tokens; i += threads) nodes[i] = -1;
    if (thread != 0) return;
    p.count[b] = count;
    p.next_token[b] = next_token;
  }
};

}  // namespace effops::device
