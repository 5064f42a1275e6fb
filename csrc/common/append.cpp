#include "common/append.h"

#include <cstring>

namespace effops {

void copy_row(const char* from, int64_t from_step, char* to, int64_t to_step, int64_t dim, int64_t bytes) {
  if (from_step == 1 && to_step == 1) {
    std::memcpy(to, from, dim * bytes);
  } else {
    for (int64_t d = 0; d < dim; ++d) std::memcpy(to + d * to_step * bytes, from + d * from_step * bytes, bytes);
  }
}

void append_rows(const AppendProblem& p) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t slot = p.slots.of(b, t);
      if (slot < 0) continue;
      for (int64_t h = 0; h < p.heads; ++h) {
        const char* from = p.from.data + (b * p.from.batch + t * p.from.token + h * p.from.head) * p.bytes;
        char* to = p.to.data + cache_offset(p.to, p.pages, b, h, slot) * p.bytes;
        copy_row(from, p.from.dim, to, p.to.dim, p.dim, p.bytes);
      }
    }
}

void commit_rows(const CommitProblem& p) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t j = 0; j < p.nodes_a_row; ++j) {
      const int64_t node = p.nodes.of(b, j);
      if (node < 0) break;
      if (node == j) continue;
      for (int64_t h = 0; h < p.heads; ++h) {
        auto at = [&](int64_t slot) {
          return p.cache.data + cache_offset(p.cache, p.pages, b, h, p.starts[b] + slot) * p.bytes;
        };
        copy_row(at(node), p.cache.dim, at(j), p.cache.dim, p.dim, p.bytes);
      }
    }
}

}  // namespace effops
