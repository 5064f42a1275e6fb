// What a list of a search takes of its candidates, which are tokens or pages.
#pragma once

#include <cstdint>

#include "common/verify.h"

namespace effops {

// All of [start, first), `free` of [first, last), all of [last, end).
struct SelectionRange {
  int64_t start, first, last, end, free;

  EFFOPS_HD int64_t candidates() const { return last - first; }
  EFFOPS_HD bool searches() const { return free > 0 && free < candidates(); }  // otherwise no score is needed

  // `count` of [start, end), among them the first `sinks` and those from `last` on.
  EFFOPS_HD static SelectionRange of(int64_t start, int64_t end, int64_t sinks, int64_t last, int64_t count) {
    SelectionRange r{start, min_of(start + sinks, end), last, end, 0};
    r.last = max_of(r.first, last);
    r.free = min_of(count - (r.first - r.start) - (r.end - r.last), r.last - r.first);
    return r;
  }
};

// Integers in the order of float32 values; both zeros are one.
EFFOPS_HD inline int32_t order_key(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

}  // namespace effops
