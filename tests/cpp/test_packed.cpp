// packed_linear: small integers and steps that are powers of two, so that every sum is exact in float32. Memory ends
// where the weight does.
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

struct PackedCase {
  int64_t rows, groups, group, out;
  PackedFormat format;
  bool zeros;
  bool int8_activation = false;
};

// Numbers and zeros as small integers; float8 has no zeros.
int number(int64_t n, int64_t i) { return static_cast<int>((n * 5 + i * 3) % 7) - 3; }
int zero(const PackedCase& c, int64_t n, int64_t g) { return c.zeros ? static_cast<int>((n + 2 * g) % 3) - 1 : 0; }
float step(int64_t n, int64_t g) { return (n + g) % 2 == 0 ? 1.0f : 0.5f; }

uint32_t field(PackedFormat format, int value) {
  constexpr uint32_t kFloat8[] = {0x00, 0x38, 0x40, 0x44};  // 0 to 3
  if (format == PackedFormat::int4) return static_cast<uint32_t>(value + 8);
  if (format == PackedFormat::int8) return static_cast<uint32_t>(value + 128);
  return kFloat8[std::abs(value)] | (value < 0 ? 0x80 : 0);
}

// The words of a feature, as common/packed_problem.h says.
std::vector<uint32_t> row_of(const PackedCase& c, const PackedMatrix& w, int64_t n) {
  std::vector<uint32_t> row;
  const int64_t each = 32 / w.bits();
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int64_t k = 0; k < w.padded_group(); ++k) {
      if (k % each == 0) row.push_back(0);
      if (k < c.group) row.back() |= field(c.format, number(n, k)) << (k % each * w.bits());
    }
    const float s = step(n, g);
    uint32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    row.push_back(bits | (c.format == PackedFormat::fp8_e4m3 ? 0 : field(c.format, zero(c, n, g))));
  }
  return row;
}

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
  PackedMatrix& w = p.weight;
  w.format = c.format;
  w.in = in;
  w.out = c.out;
  w.group = c.group;
  std::vector<uint32_t> data(c.out * w.row_words());
  for (int64_t n = 0; n < c.out; ++n) {
    const std::vector<uint32_t> row = row_of(c, w, n);
    const int64_t panel = n / kPackedPanel * kPackedPanel, width = std::min<int64_t>(kPackedPanel, c.out - panel);
    for (int64_t i = 0; i < w.row_words(); ++i) data[panel * w.row_words() + i * width + n - panel] = row[i];
  }
  w.data = reinterpret_cast<const char*>(data.data());
  p.int8_activation = c.int8_activation;
  kernels_under_test().packed_linear(p, std_threads(3));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t n = 0; n < c.out; ++n) {
      double want = bias.get(0, 0, 0, n) + residual.get(0, 0, r, n), off = 0;
      for (int64_t g = 0; g < c.groups; ++g) {
        double largest = 0, sizes = 0;
        for (int64_t i = 0; i < c.group; ++i) {
          const double value = x.get(0, 0, r, g * c.group + i), w = (number(n, i) - zero(c, n, g)) * step(n, g);
          want += value * w;
          largest = std::max(largest, std::abs(value));
          sizes += std::abs(w);
        }
        if (c.int8_activation) off += 1.001 * largest / 254 * sizes + 1e-4;
      }
      const double got = y.get(0, 0, r, n),
                   rounded = dtype == DType::f32 ? 0 : (std::abs(want) + off) * roundoff(dtype);
      const double limit = off + rounded;
      CHECK(near(got, want, limit), "y[", r, ",", n, "] ", got, " for ", want, " ", name_of(dtype), " rows ", c.rows,
            " groups ", c.groups, " of ", c.group, " out ", c.out, " format ", static_cast<int>(c.format), " zeros ",
            c.zeros);
    }
}

void check_packed(int64_t rows, int64_t groups, int64_t group, int64_t out) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (bool zeros : {false, true})
      for (PackedFormat format : {PackedFormat::int4, PackedFormat::int8})
        for (bool int8 : {false, true}) check_packed({rows, groups, group, out, format, zeros, int8}, dtype);
    check_packed({rows, groups, group, out, PackedFormat::fp8_e4m3, false}, dtype);
  }
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
