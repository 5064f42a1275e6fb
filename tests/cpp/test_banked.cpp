// Emulated units at memory banks, in guarded memory: exact sums, and nothing read or written beyond.
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

void multiply(DType dtype, Random& random) {
  PimGemvProblem p;
  p.dtype = dtype;
  p.batch = 1;
  p.rows = random.between(1, 3);
  p.units = random.pick<int64_t>({1, 3, 8});
  p.tiles = random.between(1, 3);
  p.chunks = random.between(1, 3);
  p.row_values = random.pick<int64_t>({4, 12, 16});
  p.in = random.between(1, p.chunks * p.row_values);
  p.out = random.between(1, p.tiles * p.units);
  p.sum_values = random.pick<int64_t>({1, 2, 4});
  p.sums = (p.in + p.sum_values - 1) / p.sum_values;
  p.lanes = random.pick<int64_t>({1, 4, 16, 64});
  p.channels = random.between(1, 5);
  Tensor x(dtype, {1, 1, p.rows, p.in}, random.pick({Layout::contiguous, Layout::strided}));
  Tensor banks(dtype, {p.tiles, p.chunks, p.units, p.row_values}, random.pick({Layout::contiguous, Layout::swapped}));
  Tensor results(dtype == DType::f64 ? DType::f64 : DType::f32, {1, p.rows, p.out, p.sums});
  const int32_t out = static_cast<int32_t>(random.between(0, p.out)),
                in = static_cast<int32_t>(random.between(0, p.in));
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t k = 0; k < in; ++k) x.set(0, 0, m, k, random.value());
  for (int64_t n = 0; n < out; ++n)
    for (int64_t k = 0; k < in; ++k)
      banks.set(n / p.units, k / p.row_values, n % p.units, k % p.row_values, random.value());
  x.freeze();
  banks.freeze();
  p.out_lens = &out;
  p.in_lens = &in;
  p.x = x.data();
  p.x_row = x.stride(2), p.x_value = x.stride(3);
  p.banks = banks.data();
  p.bank_tile = banks.stride(0), p.bank_chunk = banks.stride(1);
  p.bank_unit = banks.stride(2), p.bank_value = banks.stride(3);
  p.results = results.data();
  kernels_under_test().pim_gemv(p, std_threads(3));
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = 0; n < p.out; ++n)
      for (int64_t s = 0; s < p.sums; ++s) {
        double expected = 0;
        for (int64_t k = s * p.sum_values; n < out && k < (s + 1) * p.sum_values && k < in; ++k)
          expected += x.get(0, 0, m, k) * banks.get(n / p.units, k / p.row_values, n % p.units, k % p.row_values);
        CHECK(results.get(0, m, n, s) == expected, name_of(dtype), ": row ", n, " of ", p.out, ", sum ", s);
      }
}

TEST(banked_products_are_exact_and_stay_inside) {
  Random random(11);
  for (DType dtype : kDTypes)
    for (int i = 0; i < 60; ++i) multiply(dtype, random);
}

}  // namespace
}  // namespace effops::test
