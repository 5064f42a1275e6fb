#include "primitives/divide.h"

#include "run.h"

namespace effops::test {
namespace {

using device::FastDivide;

constexpr uint32_t kMost = 0x7fffffff;

void check(uint32_t n, uint32_t d, const FastDivide& f) {
  if (n > kMost) return;
  CHECK(f.quotient(n) == n / d && f.remainder(n) == n % d, n, " / ", d, ": ", f.quotient(n));
}

// Around every multiple that is not far from an edge, where a wrong multiplier shows first.
TEST(fast_divide) {
  std::vector<uint32_t> divisors;
  for (uint32_t d = 1; d <= 2048; ++d) divisors.push_back(d);
  for (int bit = 11; bit < 31; ++bit)
    for (int near : {-2, -1, 0, 1, 2}) divisors.push_back((1u << bit) + near);
  for (uint32_t d : {kMost, kMost - 1, kMost / 2, kMost / 3, 1000000007u}) divisors.push_back(d);
  for (uint32_t d : divisors) {
    if (d > kMost) continue;
    const FastDivide f(d);
    for (uint32_t n = 0; n < 4096; ++n) check(n, d, f);
    for (uint32_t q : {1u, 2u, 3u, kMost / d / 2, kMost / d - 1, kMost / d})
      for (int near : {-2, -1, 0, 1, 2}) check(q * d + near, d, f);
    for (uint32_t n = kMost - 1024; n < kMost; ++n) check(n, d, f);
    check(kMost, d, f);
  }
}

}  // namespace
}  // namespace effops::test
