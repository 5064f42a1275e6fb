// linear: all products and sums of these inputs are exact in float32, so the one rounding of the output
// is all the error there may be.
#include <cstring>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct LinearCase {
  int64_t rows, in, out;
  bool bias = false, residual = false;
  Layout layout = Layout::contiguous;  // of x, weight and residual
};

void check_linear(const LinearCase& c, DType dtype) {
  Random random(static_cast<uint32_t>(c.rows * 1000 + c.in * 10 + c.out));
  Tensor x(dtype, {1, 1, c.rows, c.in}, c.layout), weight(dtype, {1, 1, c.out, c.in}, c.layout);
  Tensor bias(dtype, {1, 1, 1, c.out}), residual(dtype, {1, 1, c.rows, c.out}, c.layout);
  Tensor y(dtype, {1, 1, c.rows, c.out});
  for (Tensor* t : {&x, &weight, &bias, &residual}) {
    t->fill(random);
    t->freeze();
  }
  LinearProblem p;
  p.dtype = dtype;
  p.rows = c.rows;
  p.in = c.in;
  p.out = c.out;
  p.x = x.data();
  p.weight = weight.data();
  p.bias = c.bias ? bias.data() : nullptr;
  p.residual = c.residual ? residual.data() : nullptr;
  p.x_row = x.stride(2);
  p.weight_row = weight.stride(2);
  p.residual_row = residual.stride(2);
  p.y = y.data();
  p.y_row = y.stride(2);
  kernels_under_test().linear(p, std_threads(3));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t n = 0; n < c.out; ++n) {
      double want = (c.bias ? bias.get(0, 0, 0, n) : 0) + (c.residual ? residual.get(0, 0, r, n) : 0);
      for (int64_t i = 0; i < c.in; ++i) want += x.get(0, 0, r, i) * weight.get(0, 0, n, i);
      const double got = y.get(0, 0, r, n), limit = dtype == DType::f32 ? 0 : std::abs(want) * roundoff(dtype);
      CHECK(near(got, want, limit), "y[", r, ",", n, "] ", got, " for ", want, " ", name_of(dtype), " rows ", c.rows,
            " in ", c.in, " out ", c.out, " layout ", int(c.layout));
    }
}

void check_linear(const LinearCase& c) {
  for (DType dtype : kDTypes) check_linear(c, dtype);
}

TEST(linear_rows) {
  for (int64_t rows = 0; rows <= kLinearRows; ++rows) check_linear({rows, 37, 21, true, true});
}

TEST(linear_features) {
  for (int64_t out : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130})
    for (int64_t rows : {1, 2, 3}) check_linear({rows, 19, out, true, false});
}

TEST(linear_depths) {
  for (int64_t in : {0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100})
    for (int64_t rows : {1, 4}) check_linear({rows, in, 18, false, true});
}

TEST(linear_layouts) {
  for (int64_t rows : {1, 2, 4, 5}) check_linear({rows, 33, 17, true, true, Layout::gapped});
}

// The norm and the gate before a product: row by row the bits of their own kernels.
void check_prepared(int64_t rows, int64_t in, bool gated, DType dtype) {
  Random random(static_cast<uint32_t>(rows * 100 + in));
  const int64_t width = gated ? 2 * in : in;
  Tensor x(dtype, {1, 1, rows, width}, Layout::gapped), weight(dtype, {1, 1, 40, in}), norm(dtype, {1, 1, 1, in});
  Tensor apart(dtype, {1, 1, rows, in}), want(dtype, {1, 1, rows, 40}), got(dtype, {1, 1, rows, 40});
  for (Tensor* t : {&x, &weight, &norm}) {
    t->fill(random);
    t->freeze();
  }
  const RowSpace space{{1, 1, rows}, {0, 0, x.stride(2)}};
  if (gated) {
    kernels_under_test().silu_mul({dtype, space, in, x.data(), apart.data()}, std_threads(1));
  } else {
    kernels_under_test().rms_norm({dtype, space, in, 0.1, 0, x.data(), norm.data(), apart.data()}, std_threads(1));
  }
  LinearProblem p;
  p.dtype = dtype;
  p.rows = rows;
  p.in = in;
  p.out = 40;
  p.x = apart.data();
  p.x_row = in;
  p.weight = weight.data();
  p.weight_row = in;
  p.y = want.data();
  p.y_row = 40;
  kernels_under_test().linear(p, std_threads(1));
  p.x = x.data();
  p.x_row = x.stride(2);
  p.norm = gated ? nullptr : norm.data();
  p.norm_eps = 0.1;
  p.gated = gated;
  p.y = got.data();
  kernels_under_test().linear(p, std_threads(3));
  CHECK(std::memcmp(got.data(), want.data(), want.bytes()) == 0, gated ? "gate" : "norm", " before a product of ", rows,
        " rows of ", in, " ", name_of(dtype));
}

TEST(linear_prepared) {
  for (DType dtype : kDTypes)
    for (int64_t rows : {1, 2, 3, 5})
      for (int64_t in : {1, 15, 16, 33, 65})
        for (bool gated : {false, true}) check_prepared(rows, in, gated, dtype);
}

// Layers side by side have the bits of each alone; silu comes after the bias and before the residual.
void check_groups(DType dtype, int64_t rows, bool shared, bool silu) {
  constexpr int64_t kGroups = 3, kIn = 37, kOut = 70;
  Random random(static_cast<uint32_t>(rows));
  const int64_t inputs = shared ? 1 : kGroups;
  Tensor x(dtype, {1, inputs, rows, kIn}), weight(dtype, {1, kGroups, kOut, kIn}), bias(dtype, {1, 1, kGroups, kOut});
  Tensor residual(dtype, {1, inputs, rows, kOut}), y(dtype, {1, kGroups, rows, kOut}, Layout::gapped);
  for (Tensor* t : {&x, &weight, &bias, &residual}) {
    t->fill(random);
    t->freeze();
  }
  LinearProblem p;
  p.dtype = dtype;
  p.rows = rows;
  p.in = p.x_row = p.weight_row = kIn;
  p.out = p.residual_row = kOut;
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.data();
  p.residual = residual.data();
  p.y = y.data();
  p.y_row = y.stride(2);
  p.silu = silu;
  p.groups = kGroups;
  p.x_group = shared ? 0 : rows * kIn;
  p.residual_group = shared ? 0 : rows * kOut;
  p.weight_group = kOut * kIn;
  p.bias_group = kOut;
  p.y_group = y.stride(1);
  kernels_under_test().linear(p, std_threads(3));
  for (int64_t g = 0; g < kGroups; ++g)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < kOut; ++n) {
        double want = bias.get(0, 0, g, n);
        for (int64_t i = 0; i < kIn; ++i) want += x.get(0, shared ? 0 : g, r, i) * weight.get(0, g, n, i);
        if (silu) want /= 1 + std::exp(-want);
        want += residual.get(0, shared ? 0 : g, r, n);
        const double got = y.get(0, g, r, n), exact = silu || dtype != DType::f32 ? 1 : 0;
        CHECK(near(got, want, exact * (4 * roundoff(dtype) * (std::abs(want) + 4) + 1e-6)), "y[", g, ",", r, ",", n,
              "] ", got, " for ", want, " ", name_of(dtype), " rows ", rows, " shared ", shared, " silu ", silu);
      }
}

TEST(linear_groups) {
  for (DType dtype : kDTypes)
    for (int64_t rows : {0, 1, 4, 9})
      for (bool shared : {false, true})
        for (bool silu : {false, true}) check_groups(dtype, rows, shared, silu);
}

TEST(linear_on_threads) { check_linear({3, 200, 300, true, true}); }

}  // namespace
}  // namespace effops::test
