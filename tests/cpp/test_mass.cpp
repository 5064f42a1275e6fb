// attention_mass against its definition, from the same lse; what lies outside a sequence is neither read nor written.
#include "attention_case.h"
#include "check.h"
#include "kernels_under_test.h"
#include "threads.h"

namespace effops::test {
namespace {

void check_mass(const AttentionCase& c, DType dtype, uint32_t seed) {
  AttentionData data(c, dtype, seed);
  kernels_under_test().attention(data.problem, std_threads(1));
  data.lse.freeze();
  Tensor mass(compute_type(dtype), {c.batch, c.capacity, c.kv_heads, 1}, c.out);
  const auto exists = [&](int64_t b, int64_t j) {
    return j >= (c.starts.empty() ? 0 : c.starts[b]) && j < (c.lens.empty() ? c.capacity : c.lens[b]);
  };
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t j = 0; j < c.capacity; ++j)
      for (int64_t g = 0; g < c.kv_heads; ++g)
        if (exists(b, j)) mass.set(b, j, g, 0, 2);
  MassProblem m{data.problem, mass.rows()};
  kernels_under_test().attention_mass(m, std_threads(3));

  const std::vector<double> want = data.mass();
  const double tolerance = (dtype == DType::f64 ? 1e-12 : 1e-4) * static_cast<double>(c.q_len * c.heads + 1);
  int64_t i = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t j = 0; j < c.capacity; ++j)
      for (int64_t g = 0; g < c.kv_heads; ++g, ++i) {
        const double got = mass.get(b, j, g, 0);
        CHECK(exists(b, j) ? near(got, 2 + want[i], tolerance) : std::isnan(got), "mass[", b, ",", j, ",", g, "] ", got,
              " for ", 2 + want[i], " ", name_of(dtype), " ", c.text());
      }
  CHECK(mass.gaps_intact(), "mass was written between elements: ", c.text());
}

void check_mass(const AttentionCase& c) {
  uint32_t seed = 1;
  for (DType dtype : kDTypes) check_mass(c, dtype, seed++);
}

TEST(mass_rows) {
  for (int64_t heads : {1, 2, 3, 4, 7, 8, 16})
    for (int64_t q_len : {1, 3, 13})
      check_mass({.q_len = q_len, .capacity = 140, .heads = heads, .head_dim = 65, .lens = {133}, .causal = true});
}

TEST(mass_tasks) {
  for (int64_t q_len : {1, 100})
    for (int64_t len : {511, 512, 513, 1025, 1100})
      check_mass({.q_len = q_len, .capacity = len, .heads = 2, .head_dim = 9, .starts = {1}, .causal = true});
}

TEST(mass_masks) {
  for (int64_t q_len : {2, 120})
    for (int64_t window : {1, 30, 64})
      check_mass({.batch = 2,
                  .q_len = q_len,
                  .capacity = 260,
                  .heads = 4,
                  .kv_heads = 2,
                  .lens = {260, 70},
                  .starts = {2, 65},
                  .causal = true,
                  .sink_logits = true,
                  .window = window,
                  .sinks = 3,
                  .softcap = 3,
                  .page = 16});
}

TEST(mass_random) {
  Random random(17);
  for (uint32_t i = 0; i < 120; ++i) {
    AttentionCase c = random_attention_case(random);
    c.cu_q = c.cu_k = {};
    check_mass(c, kDTypes[i % 4], i);
  }
}

}  // namespace
}  // namespace effops::test
