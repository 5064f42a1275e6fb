// merge_states against its definition, with empty parts and with lse far apart.
#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

void check_merge(DType dtype, int64_t parts, int64_t rows, int64_t dim) {
  Random random(static_cast<uint32_t>(parts * 100 + dim));
  Tensor outs(dtype, {1, parts, rows, dim}), lses(compute_type(dtype), {1, 1, parts, rows});
  Tensor out(dtype, {1, 1, rows, dim}), lse(compute_type(dtype), {1, 1, 1, rows});
  outs.fill(random);
  for (int64_t i = 0; i < parts; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const bool empty = r == 0 || random.between(0, 3) == 0;  // of row 0 every part is empty
      lses.set(0, 0, i, r, empty ? -INFINITY : random.value() + random.pick<double>({0, 0, 300, -300}));
      for (int64_t d = 0; empty && d < dim; ++d) outs.set(0, i, r, d, 0);
    }
  outs.freeze();
  lses.freeze();
  const MergeProblem p{dtype, dtype, parts, rows, dim, outs.data(), lses.data(), out.data(), lse.data()};
  kernels_under_test().merge_states(p, std_threads(3));
  for (int64_t r = 0; r < rows; ++r) {
    double top = -INFINITY, total = 0;
    for (int64_t i = 0; i < parts; ++i) top = std::max(top, lses.get(0, 0, i, r));
    for (int64_t i = 0; top > -INFINITY && i < parts; ++i) total += std::exp(lses.get(0, 0, i, r) - top);
    const double want_lse = top > -INFINITY ? top + std::log(total) : -INFINITY;
    // float32 keeps lse near 300 to 2^-16, which is the relative error of the weights.
    const double limit = dtype == DType::f64 ? 1e-12 : 0x1p-15;
    CHECK(near(lse.get(0, 0, 0, r), want_lse, limit), "lse[", r, "] ", lse.get(0, 0, 0, r), " for ", want_lse);
    for (int64_t d = 0; d < dim; ++d) {
      double want = 0;
      for (int64_t i = 0; top > -INFINITY && i < parts; ++i)
        want += std::exp(lses.get(0, 0, i, r) - want_lse) * outs.get(0, i, r, d);
      const double got = out.get(0, 0, r, d);
      CHECK(near(got, want, 2 * (limit + roundoff(dtype))), "out[", r, ",", d, "] ", got, " for ", want, " parts ",
            parts, " dim ", dim, " ", name_of(dtype));
    }
  }
}

TEST(merge_states) {
  for (DType dtype : kDTypes) {
    for (int64_t dim : {1, 2, 7, 8, 15, 16, 17, 31, 33, 70}) check_merge(dtype, 3, 9, dim);
    for (int64_t parts : {1, 2, 9}) check_merge(dtype, parts, 5, 20);
    check_merge(dtype, 2, 0, 20);
    check_merge(dtype, 4, 300, 33);
  }
}

}  // namespace
}  // namespace effops::test
