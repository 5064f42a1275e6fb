// All values of the 16-bit types, and the rounding between neighbours.
#include "primitives/convert.h"

#include <bit>

#include "run.h"

namespace effops::test {
namespace {

using device::Narrow;
using device::widen;

// From the formats' definitions.
double value(bool is_bf16, uint16_t bits) {
  const int fraction_bits = is_bf16 ? 7 : 10, exponent_bits = 15 - fraction_bits;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1), fraction = bits & ((1 << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  const double significand = fraction * std::ldexp(1.0, -fraction_bits) + (exponent != 0);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias);
}

template <class T>
void check_all() {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const uint16_t bits = uint16_t(i);
    const double expected = value(kBf16, bits);
    const float wide = widen(T{bits});
    CHECK(wide == expected || (std::isnan(wide) && std::isnan(expected)), i, ": ", wide, ", not ", expected);
    const uint16_t back = Narrow<T>::of(wide).bits;
    CHECK(std::isnan(wide) ? back == 0x7fff : back == bits, i, " comes back as ", back);
    // Half the way to the next value of larger magnitude, and its float neighbours. The last step leads to infinity.
    if (std::isnan(expected) || std::isinf(expected)) continue;
    const double after = value(kBf16, uint16_t(bits + 1));
    const double step = std::isinf(after) ? expected - value(kBf16, uint16_t(bits - 1)) : after - expected;
    const float middle = float(expected + step / 2);
    const auto narrow = [](float x) { return Narrow<T>::of(x).bits; };
    CHECK(narrow(middle) == bits + (bits & 1), i, ": a tie goes to ", narrow(middle));
    const float away = middle > 0 ? INFINITY : -INFINITY;
    CHECK(narrow(std::nextafter(middle, 0.0f)) == bits, i);
    CHECK(narrow(std::nextafter(middle, away)) == bits + 1, i);
  }
}

TEST(convert_bf16) { check_all<bf16>(); }
TEST(convert_f16) { check_all<f16>(); }

TEST(pack_two) {
  CHECK(device::pack<bf16>(1.0f, -2.0f) == 0xc0003f80u, "bf16");
  CHECK(device::pack<f16>(1.0f, -2.0f) == 0xc0003c00u, "f16");
}

}  // namespace
}  // namespace effops::test
