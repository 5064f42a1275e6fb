// The places of the largest keys, without sorting: the key of the last one by bisection on counts, for many short
// integers are compared at a time, then one pass that writes the places in order.
#pragma once

#include <algorithm>
#include <functional>

#include "cpu/simd/nibbles.h"

namespace effops::cpu::EFFOPS_ISA {

// Of `count` tokens. `coarse` can be read up to a multiple of 32; `fine` may be null, otherwise coarse[i] is
// fine[i] >> some number.
struct Keys {
  const int16_t* coarse;
  const int32_t* fine;
  int64_t count;
};

inline int64_t count_at_least(const Keys& keys, int16_t at) {
  constexpr int64_t kStretch = 16384;  // counts have sixteen bits, too
  int64_t all = 0;
  for (int64_t i = 0; i < keys.count; i += kStretch) {
    const int16_t* const x = keys.coarse + i;
    const int64_t n = std::min(kStretch, keys.count - i);
    int16_t some = 0;
    for (int64_t j = 0; j < n; ++j) some = static_cast<int16_t>(some + (x[j] >= at));
    all += some;
  }
  return all;
}

// The largest `at` with take <= count_at_least(at).
inline int16_t coarse_edge(const Keys& keys, int64_t take) {
  int low = INT16_MIN, high = INT16_MAX;
  constexpr int64_t kSample = 256, kMargin = 24;
  if (keys.count >= 8 * kSample) {  // a sample says where to look; counts say whether it is right
    int16_t sample[kSample];
    for (int64_t i = 0; i < kSample; ++i) sample[i] = keys.coarse[keys.count * i / kSample];
    std::sort(sample, sample + kSample, std::greater<>());
    const int64_t rank = take * kSample / keys.count;
    const int16_t below = sample[std::min(rank + kMargin, kSample - 1)],
                  above = sample[std::max<int64_t>(rank - kMargin, 0)];
    if (count_at_least(keys, below) >= take) {
      low = below;
      if (above < INT16_MAX && count_at_least(keys, static_cast<int16_t>(above + 1)) < take) high = above;
    } else {
      high = below - 1;
    }
  }
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (count_at_least(keys, static_cast<int16_t>(middle)) >= take) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return static_cast<int16_t>(low);
}

// Writes first + i for the `take` largest keys i, ascending; of equal ones the first are taken. 0 < take < count.
// `equals` holds as many as there are keys; null where keys have no fine part.
inline int32_t* write_top(const Keys& keys, int64_t take, int64_t first, int32_t* equals, int32_t* to) {
  const int16_t edge = coarse_edge(keys, take);
  int64_t left = take - (edge < INT16_MAX ? count_at_least(keys, static_cast<int16_t>(edge + 1)) : 0);
  int32_t fine_edge = INT32_MIN;
  auto each = [&](auto visit) {  // of those that reach the edge
    for (int64_t i = 0; i < keys.count; i += 32) {
      uint32_t mask = at_least(keys.coarse + i, edge);
      if (keys.count - i < 32) mask &= (1u << (keys.count - i)) - 1;
      for (; mask != 0; mask &= mask - 1) visit(i + __builtin_ctz(mask));
    }
  };
  if (keys.fine != nullptr) {
    int64_t n = 0;
    each([&](int64_t i) {
      equals[n] = keys.fine[i];
      n += keys.coarse[i] == edge;
    });
    std::nth_element(equals, equals + left - 1, equals + n, std::greater<>());
    fine_edge = equals[left - 1];
    left -= std::count_if(equals, equals + left, [&](int32_t x) { return x > fine_edge; });
  }
  each([&](int64_t i) {
    bool taken = keys.coarse[i] > edge;
    if (!taken) {
      const int32_t fine = keys.fine ? keys.fine[i] : fine_edge;
      taken = fine > fine_edge || (fine == fine_edge && left-- > 0);
    }
    if (taken) *to++ = static_cast<int32_t>(first + i);
  });
  return to;
}

}  // namespace effops::cpu::EFFOPS_ISA
