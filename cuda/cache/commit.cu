// Accepted rows to the front of their tree. A thread carries its elements of one head through all rows in order: nodes
// ascend, so that no row is overwritten before it is read.
#include "cache/cache.h"
#include "cache/place.h"

namespace effops::device {
namespace {

template <class T, int kCount>
__global__ void commit_rows_of(CommitProblem p) {
  const int64_t h = blockIdx.x % p.heads, b = blockIdx.x / p.heads, start = p.starts[b];
  T* const cache = reinterpret_cast<T*>(p.cache.data);
  for (int64_t d = threadIdx.x * kCount; d < p.dim; d += blockDim.x * kCount)
    for (int64_t j = 0; j < p.nodes_a_row; ++j) {
      const int64_t node = p.nodes.of(b, j);
      if (node < 0) break;
      const int64_t from = place_of(p.cache, p.pages, p.limits, b, h, start + node);
      const int64_t to = place_of(p.cache, p.pages, p.limits, b, h, start + j);
      if (from < 0 || to < 0 || from == to) continue;
      Items<T, kCount>::load(cache + from + d * p.cache.dim).store(cache + to + d * p.cache.dim);
    }
}

template <class T>
int start(const CommitProblem& p, void* stream) {
  const bool pieces = cache_in_pieces<T>(p.cache, p.dim);
  const int threads = threads_for(pieces ? p.dim / kItems16<T> : p.dim, 256);
  const Launch l{"commit_kv", dim3(static_cast<unsigned>(p.heads * p.batch)), threads, 0, stream};
  return pieces ? launch<CommitProblem>(l, &commit_rows_of<T, kItems16<T>>, p)
                : launch<CommitProblem>(l, &commit_rows_of<T, 1>, p);
}

}  // namespace

int commit_rows(const CommitProblem& p, void* stream) {
  return with_storage(p.bytes, [&](auto element) { return start<decltype(element)>(p, stream); });
}

}  // namespace effops::device
