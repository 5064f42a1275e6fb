// rms_norm, rotary, silu_mul and add against their definitions.
#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

constexpr int64_t kDims[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70};

// Float32 work (float64 for float64), then one rounding.
double tolerance(DType t, double want) {
  return t == DType::f64 ? 1e-13 * std::abs(want) : (1e-6 + roundoff(t)) * std::abs(want);
}

RowSpace rows_of(const Tensor& x) {
  RowSpace rows;
  for (int i = 0; i < 3; ++i) {
    rows.size[i] = x.size(i);
    rows.stride[i] = x.stride(i);
  }
  return rows;
}

// Calls body(a, b, c) for the outer indices of x.
template <class F>
void for_rows(const Tensor& x, F&& body) {
  for (int64_t a = 0; a < x.size(0); ++a)
    for (int64_t b = 0; b < x.size(1); ++b)
      for (int64_t c = 0; c < x.size(2); ++c) body(a, b, c);
}

void check_value(const char* op, double got, double want, double limit, DType dtype, int64_t dim, int64_t d) {
  CHECK(near(got, want, limit), op, ": ", got, " for ", want, " at ", d, " of ", dim, " ", name_of(dtype));
}

void check_rms_norm(DType dtype, Tensor::Shape shape, Layout layout, double eps, double offset) {
  Random random(3);
  Tensor x(dtype, shape, layout), weight(dtype, {1, 1, 1, shape[3]}), y(dtype, shape);
  x.fill(random);
  weight.fill(random);
  x.freeze();
  weight.freeze();
  RmsNormProblem p{dtype, rows_of(x), shape[3], eps, offset, x.data(), weight.data(), y.data()};
  kernels_under_test().rms_norm(p, std_threads(2));
  for_rows(x, [&](int64_t a, int64_t b, int64_t c) {
    double squares = 0;
    for (int64_t d = 0; d < shape[3]; ++d) squares += x.get(a, b, c, d) * x.get(a, b, c, d);
    const double factor = 1 / std::sqrt(squares / double(shape[3]) + eps);
    for (int64_t d = 0; d < shape[3]; ++d) {
      const double want = x.get(a, b, c, d) * factor * (weight.get(0, 0, 0, d) + offset);
      check_value("rms_norm", y.get(a, b, c, d), want, tolerance(dtype, want), dtype, shape[3], d);
    }
  });
}

TEST(rms_norm) {
  for (DType dtype : kDTypes) {
    for (int64_t dim : kDims) check_rms_norm(dtype, {2, 3, 2, dim}, Layout::swapped, 1e-6, 0);
    check_rms_norm(dtype, {2, 3, 2, 21}, Layout::gapped, 0.5, 1);
    check_rms_norm(dtype, {0, 3, 2, 21}, Layout::contiguous, 0.5, 0);
    check_rms_norm(dtype, {3, 50, 4, 70}, Layout::shared, 1e-6, 0);
  }
}

void check_rotary(DType dtype, Tensor::Shape shape, int64_t half, Layout layout) {
  constexpr int64_t kPositions = 7;
  Random random(5);
  Tensor x(dtype, shape, layout), y(dtype, shape), cos(DType::f32, {1, 1, kPositions, half});
  Tensor sin(DType::f32, {1, 1, kPositions, half});
  for (Tensor* t : {&x, &cos, &sin}) {
    t->fill(random);
    t->freeze();
  }
  const int64_t token_stride = 2, batch_stride = shape[1] * token_stride + 1;
  std::vector<int32_t> positions(shape[0] * batch_stride, -1000000);
  for (int64_t b = 0; b < shape[0]; ++b)
    for (int64_t t = 0; t < shape[1]; ++t)
      positions[b * batch_stride + t * token_stride] = static_cast<int32_t>(random.between(0, kPositions - 1));
  const Angles angles{reinterpret_cast<const float*>(cos.data()),
                      reinterpret_cast<const float*>(sin.data()),
                      half,
                      kPositions,
                      {positions.data(), batch_stride, token_stride}};
  const RotaryProblem p{dtype, rows_of(x), shape[3], angles, x.data(), y.data()};
  kernels_under_test().rotary(p, std_threads(2));
  for_rows(x, [&](int64_t b, int64_t t, int64_t h) {
    const int64_t position = positions[b * batch_stride + t * token_stride];
    for (int64_t d = 0; d < shape[3]; ++d) {
      double want = x.get(b, t, h, d);
      if (d < half) want = want * cos.get(0, 0, position, d) - x.get(b, t, h, d + half) * sin.get(0, 0, position, d);
      if (d >= half && d < 2 * half)
        want = want * cos.get(0, 0, position, d - half) + x.get(b, t, h, d - half) * sin.get(0, 0, position, d - half);
      // Exact in float32 before the rounding.
      check_value("rotary", y.get(b, t, h, d), want, dtype == DType::f32 ? 0 : std::abs(want) * roundoff(dtype), dtype,
                  shape[3], d);
    }
  });
}

TEST(rotary) {
  for (DType dtype : kDTypes) {
    for (int64_t half : kDims) check_rotary(dtype, {2, 3, 2, 2 * half}, half, Layout::swapped);
    check_rotary(dtype, {2, 3, 2, 45}, 9, Layout::gapped);
    check_rotary(dtype, {2, 0, 2, 8}, 4, Layout::contiguous);
    check_rotary(dtype, {2, 60, 4, 64}, 32, Layout::contiguous);
  }
}

// Query, key and value heads of one projection: the bits of rotary, or copies, where they belong.
void check_rotary_append(DType dtype, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t half, Layout layout) {
  constexpr int64_t kBatch = 2, kSlots = 9, kPositions = 7;
  const int64_t all = heads + 2 * kv_heads, dim = 2 * half + 3;
  Random random(7);
  Tensor x(dtype, {kBatch, tokens, all, dim}, layout == Layout::strided ? Layout::gapped : layout);
  Tensor turned(dtype, {kBatch, tokens, all, dim}), q(dtype, {kBatch, tokens, heads, dim});
  Tensor k(dtype, {kBatch, kSlots, kv_heads, dim}, layout), v(dtype, {kBatch, kSlots, kv_heads, dim}, layout);
  Tensor cos(DType::f32, {1, 1, kPositions, half}), sin(DType::f32, {1, 1, kPositions, half});
  for (Tensor* t : {&x, &cos, &sin}) {
    t->fill(random);
    t->freeze();
  }
  std::vector<int32_t> positions(kBatch * tokens), slots(kBatch * tokens);
  for (int32_t& i : positions) i = static_cast<int32_t>(random.between(0, kPositions - 1));
  for (int32_t& i : slots) i = static_cast<int32_t>(random.between(-1, kSlots - 1));
  const Angles angles{reinterpret_cast<const float*>(cos.data()),
                      reinterpret_cast<const float*>(sin.data()),
                      half,
                      kPositions,
                      {positions.data(), tokens, 1}};
  kernels_under_test().rotary({dtype, rows_of(x), dim, angles, x.data(), turned.data()}, std_threads(1));
  RotaryAppendProblem p;
  p.dtype = dtype;
  p.batch = kBatch;
  p.tokens = tokens;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.x = x.data();
  p.x_batch = x.stride(0);
  p.x_token = x.stride(1);
  p.x_head = x.stride(2);
  p.angles = angles;
  p.slots = {slots.data(), tokens, 1};
  p.q = q.data();
  p.k = k.view();
  p.v = v.view();
  kernels_under_test().rotary_append(p, std_threads(3));
  for_rows(q, [&](int64_t b, int64_t t, int64_t h) {
    for (int64_t d = 0; d < dim; ++d)
      check_value("rotary_append q", q.get(b, t, h, d), turned.get(b, t, h, d), 0, dtype, dim, d);
  });
  for_rows(k, [&](int64_t b, int64_t slot, int64_t h) {
    int64_t writer = -1;
    for (int64_t t = 0; t < tokens; ++t)
      if (slots[b * tokens + t] == slot) writer = t;
    for (int64_t d = 0; d < dim; ++d) {
      const double key = k.get(b, slot, h, d), value = v.get(b, slot, h, d);
      if (writer < 0) {
        CHECK(std::isnan(key) && std::isnan(value), "rotary_append wrote slot ", slot, " that no token names");
      } else {
        check_value("rotary_append k", key, turned.get(b, writer, heads + h, d), 0, dtype, dim, d);
        check_value("rotary_append v", value, x.get(b, writer, heads + kv_heads + h, d), 0, dtype, dim, d);
      }
    }
  });
  CHECK(k.gaps_intact() && v.gaps_intact(), "rotary_append wrote between elements");
}

TEST(rotary_append) {
  for (DType dtype : kDTypes) {
    for (Layout layout : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided})
      check_rotary_append(dtype, 5, 3, 2, 9, layout);
    check_rotary_append(dtype, 6, 0, 1, 16, Layout::swapped);
    check_rotary_append(dtype, 0, 2, 1, 4, Layout::contiguous);
    check_rotary_append(dtype, 40, 4, 2, 40, Layout::swapped);
  }
}

void check_silu_mul(DType dtype, Tensor::Shape shape, Layout layout) {
  Random random(9);
  const int64_t dim = shape[3] / 2;
  Tensor x(dtype, shape, layout), y(dtype, {shape[0], shape[1], shape[2], dim});
  x.fill(random);
  if (shape[0] > 0 && dim > 1) {  // where exp would overflow
    x.set(0, 0, 0, 0, -256);
    x.set(0, 0, 0, 1, 256);
  }
  x.freeze();
  SiluMulProblem p{dtype, rows_of(x), dim, x.data(), y.data()};
  kernels_under_test().silu_mul(p, std_threads(2));
  for_rows(x, [&](int64_t a, int64_t b, int64_t c) {
    for (int64_t d = 0; d < dim; ++d) {
      const double gate = x.get(a, b, c, d), want = gate / (1 + std::exp(-gate)) * x.get(a, b, c, dim + d);
      // 1e-36: what may flush to zero.
      check_value("silu_mul", y.get(a, b, c, d), want, tolerance(dtype, want) + 1e-36, dtype, dim, d);
    }
  });
}

TEST(silu_mul) {
  for (DType dtype : kDTypes) {
    for (int64_t dim : kDims) check_silu_mul(dtype, {2, 3, 2, 2 * dim}, Layout::swapped);
    check_silu_mul(dtype, {2, 3, 2, 30}, Layout::gapped);
    check_silu_mul(dtype, {0, 3, 2, 30}, Layout::contiguous);
    check_silu_mul(dtype, {2, 50, 2, 200}, Layout::contiguous);
  }
}

TEST(add) {
  for (DType dtype : kDTypes)
    for (int64_t count : {0, 1, 7, 16, 33, 4095, 4096, 4097, 20001}) {
      Random random(13);
      Tensor x(dtype, {1, 1, 1, count}), y(dtype, {1, 1, 1, count});
      x.fill(random);
      y.fill(random);
      x.freeze();
      std::vector<double> want(count);
      for (int64_t i = 0; i < count; ++i) want[i] = x.get(0, 0, 0, i) + y.get(0, 0, 0, i);
      kernels_under_test().add({dtype, count, x.data(), y.data()}, std_threads(2));
      for (int64_t i = 0; i < count; ++i)
        check_value("add", y.get(0, 0, 0, i), want[i], 0, dtype, count, i);  // sums of 7 bits are exact everywhere
    }
}

}  // namespace
}  // namespace effops::test
