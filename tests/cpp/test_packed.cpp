// packed_linear: small integers and steps that are powers of two, so that every sum is exact in float32. Memory ends
// where the weight does.
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct PackedCase {
  int64_t rows, groups, group, out;
  int bits;
  bool zeros;
};

void check_packed(const PackedCase& c, DType dtype) {
  Random random(static_cast<uint32_t>(c.rows * 1000 + c.group * 10 + c.out));
  const int64_t in = c.groups * c.group;
  Tensor x(dtype, {1, 1, c.rows, in}, Layout::gapped), bias(dtype, {1, 1, 1, c.out});
  Tensor residual(dtype, {1, 1, c.rows, c.out}), y(dtype, {1, 1, c.rows, c.out});
  for (Tensor* t : {&x, &bias, &residual}) {
    t->fill(random);
    t->freeze();
  }
  PackedLinearProblem p;
  p.linear.dtype = dtype;
  p.linear.rows = c.rows;
  p.linear.in = in;
  p.linear.out = c.out;
  p.linear.x = x.data();
  p.linear.x_row = x.stride(2);
  p.linear.bias = bias.data();
  p.linear.residual = residual.data();
  p.linear.residual_row = residual.stride(2);
  p.linear.y = y.data();
  p.linear.y_row = y.stride(2);
  p.bits = c.bits;
  p.group = c.group;
  std::vector<char> data(p.panels() * p.panel_bytes());
  std::vector<float> scales(p.panels() * c.groups * kPackedPanel), zeros(scales.size());
  const int middle = c.bits == 4 ? 8 : 0;
  auto place = [&](int64_t n, int64_t g) {
    return (n / kPackedPanel * c.groups + g) * kPackedPanel + n % kPackedPanel;
  };
  auto number = [&](int64_t n, int64_t i) { return static_cast<int>((n * 5 + i * 3) % 7) - 3 + middle; };
  for (int64_t n = 0; n < c.out; ++n)
    for (int64_t g = 0; g < c.groups; ++g) {
      scales[place(n, g)] = (n + g) % 2 == 0 ? 1.0f : 0.5f;
      zeros[place(n, g)] = static_cast<float>(middle + (n + 2 * g) % 3 - 1);
      for (int64_t i = 0; i < c.group; ++i) {
        const int64_t k = g * p.padded_group() + i, panel = n / kPackedPanel, column = n % kPackedPanel;
        char* const from = data.data() + panel * p.panel_bytes();
        if (c.bits == 8) {
          from[k * kPackedPanel + column] = static_cast<char>(number(n, i));
        } else {
          const int shift = static_cast<int>(k % kPackedSteps * 4);
          from[(k / kPackedSteps * kPackedPanel + column) * 4 + shift / 8] |=
              static_cast<char>(number(n, i) << shift % 8);
        }
      }
    }
  p.data = data.data();
  p.scales = scales.data();
  p.zeros = c.zeros ? zeros.data() : nullptr;
  kernels_under_test().packed_linear(p, std_threads(3));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t n = 0; n < c.out; ++n) {
      double want = bias.get(0, 0, 0, n) + residual.get(0, 0, r, n);
      for (int64_t g = 0; g < c.groups; ++g)
        for (int64_t i = 0; i < c.group; ++i)
          want += x.get(0, 0, r, g * c.group + i) * (number(n, i) - (c.zeros ? zeros[place(n, g)] : middle)) *
                  scales[place(n, g)];
      const double got = y.get(0, 0, r, n), limit = dtype == DType::f32 ? 0 : std::abs(want) * roundoff(dtype);
      CHECK(near(got, want, limit), "y[", r, ",", n, "] ", got, " for ", want, " ", name_of(dtype), " rows ", c.rows,
            " groups ", c.groups, " of ", c.group, " out ", c.out, " bits ", c.bits, " zeros ", c.zeros);
    }
}

void check_packed(int64_t rows, int64_t groups, int64_t group, int64_t out) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int bits : {4, 8})
      for (bool zeros : {false, true}) check_packed({rows, groups, group, out, bits, zeros}, dtype);
}

TEST(packed_rows) {
  for (int64_t rows = 0; rows <= 18; ++rows) check_packed(rows, 2, 16, 37);
}

TEST(packed_features) {
  for (int64_t out : {0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 130})
    for (int64_t rows : {1, 2}) check_packed(rows, 1, 24, out);
}

TEST(packed_groups) {
  for (int64_t group : {1, 7, 8, 9, 13}) check_packed(2, 1, group, 33);
  for (int64_t groups : {0, 2, 3, 5}) check_packed(3, groups, 8, 33);
}

}  // namespace
}  // namespace effops::test
