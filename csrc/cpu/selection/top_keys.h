// The places of the largest keys, without sorting: the key of the last one by counts, for many short integers are
// compared at a time, then one pass that writes the places in order.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

#include "cpu/simd/nibbles.h"

namespace effops::cpu::EFFOPS_ISA {

// Of `count` tokens. `coarse` can be read up to a multiple of 64; `fine` may be null, otherwise coarse[i] is
// fine[i] >> some number.
struct Keys {
  const int16_t* coarse;
  const int32_t* fine;
  int64_t count;
};

struct Counts {
  int64_t low, high;
};

// How many keys reach `low`, and how many `high`.
inline Counts count_at_least(const Keys& keys, int16_t low, int16_t high) {
  constexpr int64_t kStretch = 16384;  // counts have sixteen bits, too
  Counts all{0, 0};
  for (int64_t i = 0; i < keys.count; i += kStretch) {
    const int16_t* const x = keys.coarse + i;
    const int64_t n = std::min(kStretch, keys.count - i);
    int16_t some = 0, fewer = 0;
    for (int64_t j = 0; j < n; ++j) {
      some = static_cast<int16_t>(some + (x[j] >= low));
      fewer = static_cast<int16_t>(fewer + (x[j] >= high));
    }
    all.low += some;
    all.high += fewer;
  }
  return all;
}

// A bracket of the last key that is taken: `take` keys or more reach `low`, fewer reach `high`.
class EdgeSearch {
 public:
  EdgeSearch(const Keys& keys, int64_t take) : keys_(keys), take_(take), reach_low_(keys.count) {}

  void narrow(int low, int high) {  // by two keys within the bracket, low <= high
    const Counts reach = count_at_least(keys_, static_cast<int16_t>(low), static_cast<int16_t>(high));
    if (reach.high >= take_) {
      low_ = high;
      reach_low_ = reach.high;
      return;
    }
    if (reach.low >= take_) {
      low_ = low;
      reach_low_ = reach.low;
      low = high;
    }
    high_ = low;
    reach_high_ = low == high ? reach.high : reach.low;
  }

  // The bracket closes around where a straight line between its counts meets `take`, or around its middle.
  void close() {
    for (bool straight = true; high_ - low_ > 1;) {
      const int width = high_ - low_, margin = width / 16;
      const double part = static_cast<double>(reach_low_ - take_) / static_cast<double>(reach_low_ - reach_high_);
      const int at = low_ + (straight ? static_cast<int>(width * part) : width / 2);
      const int least = std::clamp(at - margin, low_ + 1, high_ - 1);
      narrow(least, std::clamp(at + margin + 1, least, high_ - 1));
      straight = high_ - low_ <= width / 2;
    }
  }

  int16_t edge() const { return static_cast<int16_t>(low_); }
  int64_t above() const { return reach_high_; }  // keys beyond the edge

 private:
  const Keys& keys_;
  int64_t take_, reach_low_, reach_high_ = 0;
  int low_ = INT16_MIN, high_ = INT16_MAX + 1;
};

// The largest key that `take` keys reach.
inline EdgeSearch coarse_edge(const Keys& keys, int64_t take) {
  EdgeSearch search(keys, take);
  constexpr int64_t kSample = 1024;
  if (keys.count >= 8 * kSample) {  // a sample says where to look; counts say whether it is right
    int16_t few[kSample];
    for (int64_t i = 0; i < kSample; ++i) few[i] = keys.coarse[keys.count * i / kSample];
    const Keys sample{few, nullptr, kSample};
    const int64_t rank = take * kSample / keys.count;
    const auto margin = static_cast<int64_t>(3 * std::sqrt(static_cast<double>(rank))) + 2;
    auto at = [&](int64_t r) {
      EdgeSearch of_sample(sample, std::clamp<int64_t>(r, 1, kSample));
      of_sample.close();
      return std::max<int>(of_sample.edge(), INT16_MIN + 1);
    };
    search.narrow(at(rank + margin), at(rank - margin));
  }
  search.close();
  return search;
}

// Writes first + i for each bit i that is set; what lies behind is written, too, but not from `end` on.
inline int32_t* write_bits(uint64_t bits, int32_t first, int32_t* to, const int32_t* end) {
  const int count = std::popcount(bits);
  if (end - to < 64) {
    for (; bits != 0; bits &= bits - 1) *to++ = first + std::countr_zero(bits);
    return to;
  }
  for (int i = 0; i < count; i += 8) {  // eight without a branch, which nothing could predict
#pragma GCC unroll 8
    for (int j = i; j < i + 8; ++j, bits &= bits - 1) to[j] = first + std::countr_zero(bits);
  }
  return to + count;
}

// Writes first + i for the `take` largest keys i, ascending; of equal ones the first are taken. 0 < take < count.
// `equals` holds as many as there are keys; null where keys have no fine part.
inline int32_t* write_top(const Keys& keys, int64_t take, int64_t first, int32_t* equals, int32_t* to) {
  const EdgeSearch search = coarse_edge(keys, take);
  int64_t left = take - search.above();
  int32_t fine_edge = INT32_MIN;
  auto compared = [&](int64_t i) {
    Compared c(keys.coarse + i, search.edge());
    if (keys.count - i < 64) {
      const uint64_t there = (uint64_t{1} << (keys.count - i)) - 1;
      c.above &= there;
      c.equal &= there;
    }
    return c;
  };
  if (keys.fine != nullptr) {
    int64_t n = 0;
    for (int64_t i = 0; i < keys.count; i += 64)
      for (uint64_t bits = compared(i).equal; bits != 0; bits &= bits - 1)
        equals[n++] = keys.fine[i + std::countr_zero(bits)];
    std::nth_element(equals, equals + left - 1, equals + n, std::greater<>());
    fine_edge = equals[left - 1];
    left -= std::count_if(equals, equals + left, [&](int32_t x) { return x > fine_edge; });
  }
  const int32_t* const end = to + take;
  for (int64_t i = 0; i < keys.count; i += 64) {
    Compared c = compared(i);
    for (uint64_t bits = c.equal; bits != 0; bits &= bits - 1) {
      const int32_t fine = keys.fine ? keys.fine[i + std::countr_zero(bits)] : fine_edge;
      if (fine > fine_edge || (fine == fine_edge && left-- > 0)) c.above |= bits & -bits;
    }
    to = write_bits(c.above, static_cast<int32_t>(first + i), to, end);
  }
  return to;
}

}  // namespace effops::cpu::EFFOPS_ISA
