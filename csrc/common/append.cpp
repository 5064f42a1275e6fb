#include "common/append.h"

#include <cstring>

namespace effops {

void append_rows(const AppendProblem& p) {
  const bool whole = p.from_stride[3] == p.bytes && p.to_stride[3] == p.bytes;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t slot = p.slots.of(b, t);
      if (slot < 0) continue;
      for (int64_t h = 0; h < p.heads; ++h) {
        const char* from = p.from + b * p.from_stride[0] + t * p.from_stride[1] + h * p.from_stride[2];
        char* to = p.to + b * p.to_stride[0] + slot * p.to_stride[1] + h * p.to_stride[2];
        if (whole) {
          std::memcpy(to, from, p.dim * p.bytes);
        } else {
          for (int64_t d = 0; d < p.dim; ++d)
            std::memcpy(to + d * p.to_stride[3], from + d * p.from_stride[3], p.bytes);
        }
      }
    }
}

}  // namespace effops
