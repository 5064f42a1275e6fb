// A list in ascending order: what is taken in any case around the best of the rest.
#pragma once

#include <numeric>

#include "common/selection_range.h"
#include "cpu/selection/top_keys.h"

namespace effops::cpu::EFFOPS_ISA {

// search(to) writes r.free of the candidates, and is called only where scores are needed. Both return where they end.
template <class Search>
int32_t* write_list(const SelectionRange& r, int32_t* to, Search search) {
  const auto all = [&](int64_t first, int64_t last) {
    int32_t* const end = to + (last - first);
    std::iota(to, end, static_cast<int32_t>(first));
    to = end;
  };
  all(r.start, r.first);
  if (r.searches()) {
    to = search(to);
  } else if (r.free > 0) {
    all(r.first, r.last);
  }
  all(r.last, r.end);
  return to;
}

}  // namespace effops::cpu::EFFOPS_ISA
