// The routing and unpermute kernels against sorts and sums in double.
#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "check.h"
#include "kernels_under_test.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Options {
  Scoring scoring = Scoring::softmax;
  bool renormalize = true, biased = false, two_best = false;
  int64_t groups = 1, chosen_groups = 1;
};

struct Routed {
  std::vector<double> weights;
  std::vector<int32_t> ids;
};

Routed route(const Tensor& x, int64_t k, const Options& o, const float* bias, int threads) {
  const int64_t tokens = x.size(2);
  Tensor weights(compute_type(x.dtype()), {1, 1, tokens, k});
  Routed r{{}, std::vector<int32_t>(tokens * k + 1, -7)};
  RoutingProblem p;
  p.dtype = x.dtype();
  p.tokens = tokens;
  p.experts = x.size(3);
  p.k = k;
  p.logits = x.data();
  p.token = x.stride(2);
  p.expert = x.stride(3);
  p.scoring = o.scoring;
  p.renormalize = o.renormalize;
  p.scale = 1.5;
  p.bias = bias;
  p.groups = o.groups;
  p.chosen_groups = o.chosen_groups;
  p.two_best = o.two_best;
  p.weights = reinterpret_cast<float*>(weights.data());
  p.ids = r.ids.data();
  kernels_under_test().routing(p, std_threads(threads));
  CHECK(r.ids.back() == -7, "routing wrote past its ids");
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < k; ++j) r.weights.push_back(weights.get(0, 0, t, j));
  return r;
}

// The experts that may be chosen, best first. Logits and biases are multiples of 1/16: of two values that differ the
// larger is no matter of rounding unless both scores are near 0 or 1.
std::vector<int64_t> ranked(const std::vector<double>& value, const Options& o) {
  const int64_t experts = static_cast<int64_t>(value.size()), size = experts / o.groups;
  std::vector<int64_t> groups(o.groups), all;
  std::iota(groups.begin(), groups.end(), 0);
  auto score = [&](int64_t g) {
    std::vector<double> own(value.begin() + g * size, value.begin() + (g + 1) * size);
    std::sort(own.rbegin(), own.rend());
    return o.two_best ? own[0] + own[1] : own[0];
  };
  std::stable_sort(groups.begin(), groups.end(), [&](int64_t a, int64_t b) { return score(a) > score(b) + 1e-9; });
  const std::set<int64_t> kept(groups.begin(), groups.begin() + o.chosen_groups);
  for (int64_t e = 0; e < experts; ++e)
    if (kept.count(e / size)) all.push_back(e);
  std::stable_sort(all.begin(), all.end(), [&](int64_t a, int64_t b) { return value[a] > value[b] + 1e-9; });
  return all;
}

void check_routing(DType dtype, int64_t tokens, int64_t experts, int64_t k, Layout layout, const Options& o,
                   int threads) {
  Random random(static_cast<uint32_t>(tokens * 1000 + experts));
  Tensor x(dtype, {1, 1, tokens, experts}, layout);
  x.fill(random);
  x.freeze();
  std::vector<float> bias(experts);
  for (float& b : bias) b = static_cast<float>(random.value());
  const List<float> biases(o.biased ? bias : std::vector<float>());
  const Routed got = route(x, k, o, biases.get(), threads);
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> s(experts), value(experts);
    double total = 0;
    for (int64_t e = 0; e < experts; ++e) total += std::exp(x.get(0, 0, t, e));
    for (int64_t e = 0; e < experts; ++e) {
      const double z = x.get(0, 0, t, e);
      s[e] = o.scoring == Scoring::softmax ? std::exp(z) / total : 1 / (1 + std::exp(-z));
      value[e] = s[e] + (o.biased ? bias[e] : 0);
    }
    const std::vector<int64_t> want = ranked(value, o);
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += s[got.ids[t * k + j]];
    for (int64_t j = 0; j < k; ++j) {
      const int32_t id = got.ids[t * k + j];
      // Groups whose sums of two differ by rounding alone may change places: then the value decides nothing.
      if (!o.two_best)
        CHECK(near(value[id], value[want[j]], 2e-6), "choice ", j, " of token ", t, ": ", id, " for ", want[j], " of ",
              experts, " ", name_of(dtype));
      const double weight = 1.5 * s[id] / (o.renormalize ? sum : 1);
      CHECK(near(got.weights[t * k + j], weight, 1e-5 * weight), "weight ", got.weights[t * k + j], " for ", weight,
            " of expert ", id, " ", name_of(dtype));
    }
    const std::set<int32_t> distinct(got.ids.begin() + t * k, got.ids.begin() + (t + 1) * k);
    CHECK(static_cast<int64_t>(distinct.size()) == k, "an expert twice");
  }
}

TEST(routing) {
  const Options each[] = {{},
                          {Scoring::softmax, false},
                          {Scoring::softmax, true, true},
                          {Scoring::sigmoid, true, true},
                          {Scoring::sigmoid, false},
                          {Scoring::sigmoid, true, true, true, 4, 2},
                          {Scoring::softmax, true, false, false, 4, 2},
                          {Scoring::softmax, false, false, true, 4, 3}};
  for (DType dtype : kDTypes)
    for (const Options& o : each) {
      for (int64_t experts : {8, 12, 16, 20, 36, 64, 128}) check_routing(dtype, 21, experts, 3, Layout::gapped, o, 2);
      for (int64_t tokens : {0, 1, 4, 8, 15, 16, 17}) check_routing(dtype, tokens, 24, 4, Layout::strided, o, 1);
      check_routing(dtype, 5, 16, 4, Layout::contiguous, o, 1);
      check_routing(dtype, 300, 40, 8, Layout::contiguous, o, 3);
    }
  for (DType dtype : kDTypes)
    for (int64_t experts : {1, 2, 3, 7, 15, 17, 33}) check_routing(dtype, 9, experts, experts, Layout::swapped, {}, 1);
}

TEST(routing_of_ties_and_flaws) {
  for (DType dtype : kDTypes) {
    Tensor x(dtype, {1, 1, 20, 35});
    for (int64_t t = 0; t < 20; ++t)
      for (int64_t e = 0; e < 35; ++e) x.set(0, 0, t, e, e % 5 == 2 ? 1 : 0);
    x.set(0, 0, 3, 34, std::nan(""));
    for (int64_t e = 0; e < 35; ++e) x.set(0, 0, 4, e, -kInfinity);
    x.freeze();
    const Routed got = route(x, 9, {}, nullptr, 1);
    for (int64_t t = 0; t < 20; ++t)
      for (int64_t j = 0; j < 9; ++j) {
        const int64_t want = t == 4 ? j : j < 7 ? 2 + 5 * j : j - 7;
        CHECK(t == 3 || got.ids[t * 9 + j] == want, "token ", t, ": ", got.ids[t * 9 + j], " for ", want);
        CHECK(std::isnan(got.weights[t * 9 + j]) == (t == 3 || t == 4), "token ", t, ": ", got.weights[t * 9 + j]);
      }
  }
}

void check_unpermute(DType dtype, int64_t tokens, int64_t k, int64_t dim, bool weighted, int threads) {
  Random random(static_cast<uint32_t>(dim + tokens));
  const int64_t rows = tokens * k / 2 + 1;
  Tensor y(dtype, {1, 1, rows, dim}, Layout::gapped), out(dtype, {1, 1, tokens, dim});
  Tensor weights(compute_type(dtype), {1, 1, tokens, k});
  y.fill(random);
  y.freeze();
  std::vector<int32_t> places(tokens * k);
  for (int64_t i = 0; i < tokens * k; ++i) {
    places[i] = static_cast<int32_t>(random.between(-1, rows - 1));
    if (places[i] >= 0) weights.set(0, 0, i / k, i % k, random.value());  // beside -1 stays NaN
  }
  weights.freeze();
  const List<int32_t> inverse(places);
  UnpermuteProblem p;
  p.dtype = dtype;
  p.tokens = tokens;
  p.k = k;
  p.dim = dim;
  p.slots = rows;
  p.y = y.data();
  p.y_row = y.stride(2);
  p.weights = weighted ? weights.data() : nullptr;
  p.inverse = inverse.get();
  p.out = out.data();
  kernels_under_test().unpermute(p, std_threads(threads));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = 0; d < dim; ++d) {
      double want = 0;
      for (int64_t j = 0; j < k; ++j)
        if (const int32_t i = places[t * k + j]; i >= 0)
          want += (weighted ? weights.get(0, 0, t, j) : 1) * y.get(0, 0, i, d);
      const double got = out.get(0, 0, t, d);
      CHECK(near(got, want, roundoff(dtype) * std::abs(want)), "token ", t, " feature ", d, ": ", got, " for ", want);
    }
}

TEST(unpermute) {
  for (DType dtype : kDTypes)
    for (bool weighted : {true, false}) {
      for (int64_t dim : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130})
        check_unpermute(dtype, 7, 3, dim, weighted, 1);
      check_unpermute(dtype, 0, 2, 8, weighted, 1);
      check_unpermute(dtype, 5, 0, 8, weighted, 1);
      check_unpermute(dtype, 200, 2, 150, weighted, 3);
    }
}

}  // namespace
}  // namespace effops::test
