// attention: the streaming and the GEMM-shaped loop, splits and their join, against the definition.
#include "attention_case.h"
#include "check.h"
#include "kernels_under_test.h"
#include "threads.h"

namespace effops::test {
namespace {

// Of outputs up to 2 in magnitude: float32 work, one rounding of the output and, in bfloat16, one of the
// probabilities. lse is never rounded to storage.
double out_tolerance(DType t) { return t == DType::f64 ? 1e-12 : 4e-5 + 2 * 2 * roundoff(t); }
double lse_tolerance(DType t) { return t == DType::f64 ? 1e-12 : 4e-5; }

void check_attention(const AttentionCase& c, DType dtype, uint32_t seed) {
  AttentionData data(c, dtype, seed), alone(c, dtype, seed);
  kernels_under_test().attention(data.problem, std_threads(3));
  kernels_under_test().attention(alone.problem, std_threads(1));
  const AttentionReference want = data.forward();
  const int64_t owned = c.cu_q.empty() ? c.q_len : c.cu_q.back();
  for (int64_t b = 0; b < data.q.size(0); ++b)
    for (int64_t t = 0; t < c.q_len; ++t)
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t row = (b * c.q_len + t) * c.heads + h;
        const double lse = data.lse.get(b, t, h, 0);
        if (t >= owned) {
          CHECK(std::isnan(lse), "a row of no sequence was written: ", c.text());
          continue;
        }
        CHECK(near(lse, want.lse[row], lse_tolerance(dtype)), "lse[", b, ",", t, ",", h, "] ", lse, " for ",
              want.lse[row], " ", name_of(dtype), " ", c.text());
        for (int64_t d = 0; d < c.v_dim; ++d) {
          const double got = data.out.get(b, t, h, d), expected = want.out[row * c.v_dim + d];
          CHECK(near(got, expected, out_tolerance(dtype)), "out[", b, ",", t, ",", h, ",", d, "] ", got, " for ",
                expected, " ", name_of(dtype), " ", c.text());
        }
      }
  CHECK(data.out.gaps_intact() && data.lse.gaps_intact(), "written between elements: ", c.text());
  CHECK(std::memcmp(data.out.data(), alone.out.data(), data.out.bytes()) == 0 &&
            std::memcmp(data.lse.data(), alone.lse.data(), data.lse.bytes()) == 0,
        "three threads give other bits than one: ", c.text());
}

void check_attention(const AttentionCase& c) {
  uint32_t seed = 1;
  for (DType dtype : kDTypes) check_attention(c, dtype, seed++);
}

// Every number of rows that the streaming loop groups differently, and the first beyond it.
TEST(attention_rows) {
  for (int64_t rows = 1; rows <= 18; ++rows)
    check_attention({.q_len = rows, .capacity = 70, .head_dim = 33, .v_dim = 17, .causal = true});
  for (int64_t rows : {19, 22, 31, 32, 39, 40, 41})
    check_attention({.q_len = rows, .capacity = 130, .head_dim = 66, .v_dim = 9, .causal = true});
  for (int64_t group = 1; group <= 17; ++group)
    check_attention({.capacity = 66, .heads = 2 * group, .kv_heads = 2, .head_dim = 16, .v_dim = 65});
}

TEST(attention_dims) {
  for (int64_t dim = 1; dim <= 70; dim += dim < 18 ? 1 : 7) {
    check_attention({.q_len = 2, .capacity = 9, .head_dim = dim, .v_dim = 71 - dim});
    check_attention({.q_len = 19, .capacity = 9, .head_dim = dim, .v_dim = 71 - dim});
  }
  check_attention({.q_len = 3, .capacity = 67, .head_dim = 256, .v_dim = 256});
  check_attention({.q_len = 20, .capacity = 67, .head_dim = 256, .v_dim = 256});
}

TEST(attention_tiles) {
  for (int32_t len : {0, 1, 2, 15, 16, 31, 33, 63, 64, 65, 127, 128, 129})
    for (int64_t q_len : {1, 20})
      check_attention({.batch = 2, .q_len = q_len, .capacity = 130, .lens = {len, 130 - len}, .causal = true});
}

TEST(attention_splits_of_the_streaming_loop) {
  for (int64_t len : {1024, 1025, 2049})
    check_attention({.q_len = 3, .capacity = len, .head_dim = 5, .v_dim = 9, .causal = true});
  check_attention({.batch = 2,
                   .q_len = 2,
                   .capacity = 1100,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = 4,
                   .v_dim = 40,
                   .lens = {1100, 1030},
                   .starts = {3, 7},
                   .sink_logits = true});
}

TEST(attention_splits_of_the_gemm_loop) {
  for (int64_t len : {4096, 4097})
    check_attention({.q_len = 17, .capacity = len, .head_dim = 3, .v_dim = 4, .causal = true, .softcap = 2});
}

// Enough partial rows that the join goes to threads too.
TEST(attention_join_on_threads) {
  const AttentionCase c{
      .batch = 4, .q_len = 8, .capacity = 1040, .heads = 16, .kv_heads = 8, .head_dim = 2, .v_dim = 72, .causal = true};
  check_attention(c, DType::f32, 1);
  check_attention(c, DType::bf16, 2);
}

TEST(attention_blocks) {
  for (int64_t rows : {95, 96, 97, 193})
    check_attention({.q_len = rows, .capacity = 200, .head_dim = 6, .v_dim = 5, .causal = true});
  check_attention({.q_len = 300, .capacity = 300, .heads = 2, .head_dim = 4, .v_dim = 4, .causal = true, .window = 70});
}

TEST(attention_pages) {
  for (int64_t q_len : {1, 3, 20})
    for (int64_t page : {1, 5, 16, 64, 200})
      for (Layout kv : {Layout::swapped, Layout::strided})
        check_attention({.batch = 2,
                         .q_len = q_len,
                         .capacity = 200,
                         .heads = 4,
                         .kv_heads = 2,
                         .head_dim = 33,
                         .v_dim = 16,
                         .lens = {200, 131},
                         .starts = {3, 70},
                         .causal = true,
                         .page = page,
                         .kv = kv});
}

TEST(attention_trees) {
  for (int64_t q_len : {1, 4, 13, 70})
    for (int64_t page : {0, 16})
      for (int64_t window : {0, 5, 90})
        check_attention({.batch = 2,
                         .q_len = q_len,
                         .capacity = 210,
                         .heads = 2,
                         .head_dim = 16,
                         .v_dim = 9,
                         .lens = {210, static_cast<int32_t>(q_len)},
                         .starts = {20, 1},
                         .window = window,
                         .sinks = window ? 3 : 0,
                         .page = page,
                         .tree = true});
}

TEST(attention_masks) {
  for (int64_t q_len : {1, 5, 40})
    for (int64_t sinks : {0, 1, 4, 64, 66})
      for (int64_t window : {0, 1, 2, 63, 64, 65, 128})
        check_attention({.batch = 2,
                         .q_len = q_len,
                         .capacity = 210,
                         .lens = {210, 97},
                         .causal = true,
                         .window = window,
                         .sinks = sinks});
  check_attention({.batch = 2,
                   .q_len = 30,
                   .capacity = 140,
                   .lens = {140, 50},
                   .starts = {0, 45},
                   .prefixes = {70, 3},
                   .causal = true});
  check_attention({.batch = 2,
                   .q_len = 3,
                   .capacity = 140,
                   .lens = {140, 50},
                   .starts = {66, 45},
                   .prefixes = {139, 200},
                   .causal = true,
                   .window = 5,
                   .sinks = 2});
  check_attention({.q_len = 20,
                   .capacity = 150,
                   .heads = 6,
                   .kv_heads = 3,
                   .head_windows = {0, 1, 65},
                   .causal = true,
                   .sinks = 3});
}

TEST(attention_empty) {
  check_attention({.batch = 3, .q_len = 2, .capacity = 6, .lens = {0, 6, 1}, .causal = true, .sink_logits = true});
  check_attention({.batch = 2, .q_len = 2, .capacity = 6, .lens = {4, 6}, .starts = {4, 6}});
  check_attention({.batch = 2, .q_len = 0, .capacity = 6});
  check_attention({.batch = 0, .q_len = 2, .capacity = 6});
  check_attention({.batch = 2, .q_len = 20, .capacity = 0, .causal = true});
  check_attention({.q_len = 9, .capacity = 4, .causal = true, .window = 2});  // negative positions
  check_attention({.q_len = 40, .capacity = 4, .prefixes = {3}, .causal = true});
  check_attention({.batch = 3,
                   .q_len = 24,
                   .capacity = 31,
                   .heads = 2,
                   .cu_q = {0, 0, 20, 22},
                   .cu_k = {0, 9, 9, 30},
                   .causal = true});
}

TEST(attention_layouts) {
  for (Layout kv : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided, Layout::shared})
    for (Layout other : {Layout::contiguous, Layout::swapped, Layout::gapped, Layout::strided})
      for (int64_t q_len : {2, 20})
        check_attention({.batch = 2,
                         .q_len = q_len,
                         .capacity = 70,
                         .heads = 6,
                         .kv_heads = 3,
                         .head_dim = 20,
                         .v_dim = 12,
                         .causal = true,
                         .q = other,
                         .kv = kv,
                         .out = other});
}

TEST(attention_random) {
  Random random(7);
  for (uint32_t i = 0; i < 160; ++i) check_attention(random_attention_case(random), kDTypes[i % 4], i);
}

}  // namespace
}  // namespace effops::test
