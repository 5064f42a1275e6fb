// attention_backward against the formulas, from the same rounded out and lse.
#include "attention_case.h"
#include "check.h"
#include "kernels_under_test.h"
#include "threads.h"

namespace effops::test {
namespace {

// Relative to the case's largest gradient: float32 work and one rounding.
double tolerance(DType t) { return t == DType::f64 ? 1e-12 : 1e-4 + roundoff(t); }

void check_gradient(const char* name, const Tensor& got, const std::vector<double>& want, double tolerance,
                    const AttentionCase& c) {
  int64_t i = 0;
  for (int64_t a = 0; a < got.size(0); ++a)
    for (int64_t b = 0; b < got.size(1); ++b)
      for (int64_t h = 0; h < got.size(2); ++h)
        for (int64_t d = 0; d < got.size(3); ++d, ++i)
          CHECK(near(got.get(a, b, h, d), want[i], tolerance), name, "[", a, ",", b, ",", h, ",", d, "] ",
                got.get(a, b, h, d), " for ", want[i], " ", name_of(got.dtype()), " ", c.text());
  CHECK(got.gaps_intact(), name, " was written between elements: ", c.text());
}

// The caller's part of the contract: gradients of tokens that belong to no sequence are zero.
Tensor zeros(DType dtype, Tensor::Shape shape, Layout layout) {
  Tensor t(dtype, shape, layout);
  for (int64_t a = 0; a < shape[0]; ++a)
    for (int64_t b = 0; b < shape[1]; ++b)
      for (int64_t c = 0; c < shape[2]; ++c)
        for (int64_t d = 0; d < shape[3]; ++d) t.set(a, b, c, d, 0);
  return t;
}

void check_backward(const AttentionCase& c, DType dtype, uint32_t seed) {
  AttentionData data(c, dtype, seed);
  kernels_under_test().attention(data.problem, std_threads(1));
  data.out.freeze();
  data.lse.freeze();
  const int64_t batch = data.q.size(0);
  Random random(seed);
  Tensor d_out(dtype, {batch, c.q_len, c.heads, c.v_dim}, c.q), d_lse;
  d_out.fill(random);
  d_out.freeze();
  if (seed % 3 != 0) {
    d_lse = Tensor(compute_type(dtype), {batch, c.q_len, c.heads, 1}, c.q);
    d_lse.fill(random);
    d_lse.freeze();
  }
  Tensor dq = zeros(dtype, {batch, c.q_len, c.heads, c.head_dim}, c.out);
  Tensor dk = zeros(dtype, {batch, c.capacity, c.kv_heads, c.head_dim}, c.out);
  Tensor dv = zeros(dtype, {batch, c.capacity, c.kv_heads, c.v_dim}, c.out);
  Tensor dsink(compute_type(dtype), {1, 1, c.batch, c.heads});
  AttentionGradients g{d_out.view(), dq.view(), dk.view(), dv.view(), {}, nullptr};
  if (d_lse.bytes() > 0) g.d_lse = d_lse.rows();
  if (c.sink_logits) g.dsink = dsink.data();
  kernels_under_test().attention_backward(data.problem, g, std_threads(3));

  AttentionReference want;
  data.backward(d_out, d_lse, want);
  const double limit = tolerance(dtype) * std::max(1.0, want.largest_gradient);
  check_gradient("dq", dq, want.dq, limit, c);
  check_gradient("dk", dk, want.dk, limit, c);
  check_gradient("dv", dv, want.dv, limit, c);
  if (c.sink_logits) check_gradient("dsink", dsink, want.dsink, limit, c);
}

void check_backward(const AttentionCase& c) {
  uint32_t seed = 1;
  for (DType dtype : kDTypes) check_backward(c, dtype, seed++);
}

TEST(backward_dims) {
  for (int64_t dim : {1, 7, 8, 15, 16, 17, 31, 33, 64, 65})
    check_backward({.q_len = 5, .capacity = 9, .head_dim = dim, .v_dim = 66 - dim, .causal = true});
}

TEST(backward_blocks_and_tiles) {
  for (int64_t q_len : {1, 63, 64, 65})
    for (int64_t len : {1, 64, 130})
      check_backward({.q_len = q_len, .capacity = len, .heads = 2, .head_dim = 8, .v_dim = 5, .causal = true});
}

TEST(backward_masks) {
  for (int64_t window : {0, 1, 30, 64})
    check_backward({.batch = 2,
                    .q_len = 20,
                    .capacity = 140,
                    .heads = 4,
                    .kv_heads = 2,
                    .lens = {140, 70},
                    .starts = {2, 65},
                    .causal = true,
                    .sink_logits = true,
                    .window = window,
                    .sinks = 3});
  check_backward(
      {.batch = 2, .q_len = 9, .capacity = 80, .lens = {80, 0}, .prefixes = {75, 2}, .causal = true, .softcap = 3});
  check_backward({.q_len = 20, .capacity = 6, .causal = true});
  check_backward({.batch = 3,
                  .q_len = 24,
                  .capacity = 31,
                  .heads = 2,
                  .cu_q = {0, 0, 20, 22},
                  .cu_k = {0, 9, 9, 30},
                  .causal = true});
}

TEST(backward_random) {
  Random random(11);
  for (uint32_t i = 0; i < 80; ++i) check_backward(random_attention_case(random), kDTypes[i % 4], i);
}

}  // namespace
}  // namespace effops::test
