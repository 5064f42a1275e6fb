// Rows of parents into ancestor bits and depths: a thread follows one node up to its root. Parents come before their
// children; where one does not, the path ends.
#include "common/tree.h"
#include "primitives/element.h"
#include "speculative/speculative.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

__global__ void pack_nodes(PackProblem p) {
  const int64_t words = ancestor_words(p.tokens);
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < p.batch * p.tokens; n += gridDim.x * kThreads) {
    const int64_t b = n / p.tokens, i = n % p.tokens;
    int64_t* const row = p.ancestors + n * words;
    for (int64_t w = 0; w < words; ++w) row[w] = 0;
    int32_t depth = -1;
    for (int64_t at = i, next; at >= 0; at = next < at ? next : -1) {
      row[at >> 6] |= static_cast<int64_t>(uint64_t(1) << (at & 63));
      ++depth;
      next = p.parents.of(b, at);
    }
    p.depths[n] = depth;
  }
}

}  // namespace

int pack_ancestors(const PackProblem& p, void* stream) {
  const int64_t blocks = (p.batch * p.tokens + kThreads - 1) / kThreads;
  return launch<PackProblem>({"pack_ancestors", stride_grid(blocks), kThreads, 0, stream}, &pack_nodes, p);
}

}  // namespace effops::device
