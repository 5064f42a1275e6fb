// The sampling kernel against a sort: laws, draws, ties, rows that have no law.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Filters {
  double temperature = 1;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
};

SamplingProblem problem_of(const Tensor& x, const Filters& f) {
  SamplingProblem p;
  p.dtype = x.dtype();
  for (int i = 0; i < 3; ++i) {
    p.rows.size[i] = x.size(i);
    p.rows.stride[i] = x.stride(i);
  }
  p.size = x.size(3);
  p.temperature = f.temperature;
  p.top_k = f.top_k;
  p.top_p = f.top_p;
  p.min_p = f.min_p;
  p.x = x.data();
  return p;
}

struct Law {
  std::vector<double> probs;
  bool near = false;  // a comparison with a threshold that rounding may turn
};

Law law_of(const std::vector<double>& x, const Filters& f) {
  constexpr double kNear = 5e-6;
  const int64_t size = static_cast<int64_t>(x.size());
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  Law law{std::vector<double>(size), false};
  if (f.temperature == 0) {
    law.probs[order[0]] = 1;
    return law;
  }
  if (f.top_k > 0 && f.top_k < size) order.resize(f.top_k);
  auto weight = [&](int64_t i) { return std::exp((x[i] - x[order[0]]) / f.temperature); };
  double total = 0, before = 0, kept = 0;
  for (int64_t i : order) total += weight(i);
  for (int64_t i : order) {
    law.near = law.near || (f.top_p < 1 && std::abs(before / total - f.top_p) < kNear) ||
               (f.min_p > 0 && std::abs(weight(i) - f.min_p) < kNear * f.min_p);
    if ((f.top_p == 1 || before / total < f.top_p) && weight(i) >= f.min_p) kept += law.probs[i] = weight(i);
    before += weight(i);
  }
  for (double& p : law.probs) p /= kept;
  return law;
}

void check_sampling(DType dtype, Tensor::Shape shape, Layout layout, const Filters& f, int threads) {
  Random random(17);
  Tensor x(dtype, shape, layout);
  x.fill(random);  // multiples of 1/16: many ties
  for (int64_t d = 0; d < shape[3]; d += 5)
    if (shape[0] > 0 && d > 0) x.set(0, 0, 0, d, -kInfinity);
  x.freeze();
  const int64_t rows = shape[0] * shape[1] * shape[2];
  std::vector<double> uniforms(rows);
  for (double& u : uniforms) u = static_cast<double>(random.between(0, 999)) / 1000;
  const List<double> given(uniforms);
  Tensor tokens(DType::f64, {1, 1, 1, rows}), probs(compute_type(dtype), shape);
  FlawedRow flawed;
  SamplingProblem p = problem_of(x, f);
  p.flawed = &flawed;
  p.probs = probs.data();
  kernels_under_test().sampling(p, std_threads(threads));
  p.probs = nullptr;
  p.tokens = reinterpret_cast<int64_t*>(tokens.data());
  p.uniforms = f.temperature == 0 ? nullptr : given.get();
  kernels_under_test().sampling(p, std_threads(threads));
  CHECK(!flawed.any(), "sampling refused row ", flawed.row());
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t c = row % shape[2], b = row / shape[2] % shape[1], a = row / shape[2] / shape[1];
    std::vector<double> logits(shape[3]);
    for (int64_t d = 0; d < shape[3]; ++d) logits[d] = x.get(a, b, c, d);
    const Law law = law_of(logits, f);
    const int64_t token = p.tokens[row];
    CHECK(token >= 0 && token < shape[3] && probs.get(a, b, c, token) > 0, "sampling drew ", token, " of ", shape[3]);
    if (law.near) continue;
    double below = 0;
    for (int64_t d = 0; d < shape[3]; ++d) {
      const double got = probs.get(a, b, c, d), want = law.probs[d];
      CHECK(near(got, want, 1e-5 * want), "sampling: ", got, " for ", want, " at ", d, " of ", shape[3], " ",
            name_of(dtype), " k ", f.top_k, " p ", f.top_p, " min ", f.min_p, " T ", f.temperature);
      if (d < token) below += want;
    }
    if (f.temperature > 0)
      CHECK(below <= uniforms[row] + 1e-5 && uniforms[row] <= below + law.probs[token] + 1e-5, "sampling: ", token,
            " from ", below, " for ", uniforms[row], " of ", shape[3], " ", name_of(dtype));
  }
}

TEST(sampling) {
  const Filters each[] = {{},           {0, 3, 0.5, 0},  {0.5},       {1, 1}, {1, 7}, {2, 40, 0.83, 0.013},
                          {1, 0, 0.77}, {1, 0, 1, 0.31}, {3, 64, 0.6}};
  for (DType dtype : kDTypes)
    for (const Filters& f : each) {
      for (int64_t size : {1, 2, 7, 8, 15, 16, 17, 33, 63, 64, 65, 130, 257})
        check_sampling(dtype, {2, 3, 2, size}, Layout::swapped, f, 2);
      check_sampling(dtype, {2, 3, 2, 21}, Layout::gapped, f, 1);
      check_sampling(dtype, {0, 3, 2, 21}, Layout::contiguous, f, 1);
      check_sampling(dtype, {3, 1, 2, 5000}, Layout::shared, f, 3);
      check_sampling(dtype, {1, 1, 1, 20001}, Layout::contiguous, f, 1);
    }
}

void check_best(DType dtype, int64_t size, int64_t best, int threads) {
  Random random(static_cast<uint32_t>(size));
  Tensor x(dtype, {2, 1, 3, size}, Layout::swapped);
  x.fill(random);  // many ties
  if (size > 4) x.set(1, 0, 2, 3, -kInfinity);
  x.freeze();
  std::vector<int64_t> got(6 * best + 1, -7);
  FlawedRow flawed;
  SamplingProblem p = problem_of(x, {});
  p.flawed = &flawed;
  p.best = best;
  p.tokens = got.data();
  kernels_under_test().sampling(p, std_threads(threads));
  CHECK(!flawed.any() && got.back() == -7, "best refused row ", flawed.row(), " or wrote past its end");
  for (int64_t row = 0; row < 6; ++row) {
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    auto at = [&](int64_t i) { return x.get(row / 3, 0, row % 3, i); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return at(a) > at(b); });
    for (int64_t r = 0; r < best; ++r)
      CHECK(got[row * best + r] == order[r], "rank ", r, ": ", got[row * best + r], " for ", order[r], " of ", size,
            " ", name_of(dtype));
  }
}

TEST(sampling_best) {
  for (DType dtype : kDTypes)
    for (int64_t size : {1, 2, 5, 16, 17, 64, 65, 130, 700, 20001})
      for (int64_t best : {1, 2, 3, 10, 64, 65, 300})
        if (best <= size) check_best(dtype, size, best, 2);
}

TEST(sampling_names_the_first_row_without_a_law) {
  const std::pair<double, RowFlaw> flaws[] = {{std::nan(""), RowFlaw::nan}, {kInfinity, RowFlaw::infinite}};
  for (DType dtype : kDTypes)
    for (int64_t at : {0, 7, 63, 64, 69})  // in a vector, in a tail
      for (auto [value, flaw] : flaws) {
        Random random(19);
        Tensor x(dtype, {40, 2, 3, 70}), probs(compute_type(dtype), {40, 2, 3, 70});
        x.fill(random);
        x.set(11, 1, 2, at, value);
        for (int64_t d = 0; d < 70; ++d) x.set(30, 0, 1, d, -kInfinity);
        FlawedRow flawed;
        SamplingProblem p = problem_of(x, {});
        p.flawed = &flawed;
        p.probs = probs.data();
        kernels_under_test().sampling(p, std_threads(3));
        CHECK(flawed.row() == 71 && flawed.flaw() == flaw, "sampling found row ", flawed.row());
        x.set(11, 1, 2, at, 0);
        FlawedRow later;
        p.flawed = &later;
        kernels_under_test().sampling(p, std_threads(3));
        CHECK(later.row() == 181 && later.flaw() == RowFlaw::empty, "sampling found row ", later.row());
      }
}

}  // namespace
}  // namespace effops::test
