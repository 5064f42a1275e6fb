// Where a prefix of the descending order ends, without sorting: a weighted selection by radix on the
// bits of the values. Linear in their number, whatever they are.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace effops::cpu::EFFOPS_ISA {

template <class C>
using OrderBits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;

// Unsigned integers in the order of the values; both zeros are one.
template <class C>
inline OrderBits<C> order_bits(C x) {
  using U = OrderBits<C>;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  x += C(0);
  U u;
  std::memcpy(&u, &x, sizeof u);
  return u & sign ? ~u : u | sign;
}

template <class C>
struct Edge {  // of a prefix: all above `at`, and the first `ties` of those that are equal to it
  OrderBits<C> at;
  int64_t ties;
};

// The edge of the smallest prefix whose masses add up to `enough`; where rounding leaves their sum below
// it, of all that have a mass. Equal values have equal masses, and one at least is above zero. Both
// lists are overwritten. Sums are in double and in an order that the values alone decide.
template <class C>
Edge<C> edge_of(OrderBits<C>* order, C* mass, int64_t count, double enough) {
  using U = OrderBits<C>;
  constexpr int kBits = 10;
  double bins[2][1 << kBits];  // neighbours often fall into one bin: two sums do not wait for each other
  U low = order[0], high = low;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, order[i]);
    high = std::max(high, order[i]);
  }
  int shift = std::max(0, static_cast<int>(std::bit_width(U(high - low))) - kBits);
  double above = 0;
  for (;; shift = std::max(0, shift - kBits)) {
    std::memset(bins, 0, sizeof bins);
    for (int64_t i = 0; i < count; ++i) bins[i % 2][(order[i] - low) >> shift] += mass[i];
    int edge = 0;
    double sum = above;
    for (int b = 1 << kBits; b-- > 0 && sum < enough;) {
      const double inside = bins[0][b] + bins[1][b];
      if (inside == 0) continue;
      edge = b;
      above = sum;
      sum += inside;
    }
    low += U(edge) << shift;
    int64_t inside = 0;
    for (int64_t i = 0; i < count; ++i) {  // without a branch, which nothing could predict
      const U at = order[i];
      order[inside] = at;
      mass[inside] = mass[i];
      inside += (at - low) >> shift == 0;
    }
    count = inside;
    if (shift == 0) break;
  }
  int64_t ties = 1;
  while (ties < count && above + static_cast<double>(ties) * mass[0] < enough) ++ties;
  return {low, ties};
}

}  // namespace effops::cpu::EFFOPS_ISA
