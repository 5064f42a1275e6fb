// Routing, against a plain loop.
#include <algorithm>
#include <numeric>

#include "kernel_memory.h"
#include "moe/moe.h"

namespace effops::test {
namespace {

struct RoutingCase {
  int tokens = 3, experts = 8, k = 2;
  Scoring scoring = Scoring::softmax;
  bool renormalize = true, bias = false, two_best = false, strided = false;
  int groups = 1, chosen = 1;

  std::string text() const {
    std::ostringstream o;
    o << tokens << " tokens, " << experts << " experts, k " << k << (scoring == Scoring::softmax ? "" : ", sigmoid")
      << (renormalize ? "" : ", as they are") << (bias ? ", bias" : "") << (two_best ? ", two best" : "")
      << (strided ? ", strided" : "") << ", " << chosen << " of " << groups << " groups";
    return o.str();
  }
};

template <class T>
class Routing {
  using C = device::Compute<T>;

 public:
  // Logits are distinct multiples of 1/16 (equal: in pairs), so that no rounding decides.
  explicit Routing(const RoutingCase& c, bool equal = false)
      : c_(c),
        token_(c.strided ? 1 : c.experts),
        expert_(c.strided ? c.tokens : 1),
        logits_(int64_t(c.tokens) * c.experts),
        weights_(int64_t(c.tokens) * c.k),
        bias_(c.bias ? c.experts : 0),
        ids_(int64_t(c.tokens) * c.k) {
    Integers draw(c.experts + c.k);
    for (int t = 0; t < c.tokens; ++t) {
      std::vector<int> order(c.experts);
      std::iota(order.begin(), order.end(), 0);
      for (int e = c.experts - 1; e > 0; --e) std::swap(order[e], order[draw(0, e)]);
      for (int e = 0; e < c.experts; ++e) {
        const int rank = equal ? order[e] / 2 * 2 : order[e];
        logits_.set(t * token_ + e * expert_, (rank - c.experts / 2) / (c.experts > 64 ? 256.0 : 16.0));
      }
    }
    for (int e = 0; c.bias && e < c.experts; ++e) bias_[e] = static_cast<float>((e * 5 % c.experts) * 2);
  }

  Buffer<T>& logits() { return logits_; }
  double weight(int t, int j) const { return weights_.value(t * c_.k + j); }
  int id(int t, int j) const { return ids_[t * c_.k + j]; }

  void run() {
    RoutingProblem p;
    p.dtype = sizeof(T) == 8            ? DType::f64
              : sizeof(T) == 4          ? DType::f32
              : std::is_same_v<T, bf16> ? DType::bf16
                                        : DType::f16;
    p.tokens = c_.tokens;
    p.experts = c_.experts;
    p.k = c_.k;
    p.logits = logits_.raw();
    p.token = token_;
    p.expert = expert_;
    p.scoring = c_.scoring;
    p.renormalize = c_.renormalize;
    p.scale = 2.5;
    p.bias = bias_.get();
    p.groups = c_.groups;
    p.chosen_groups = c_.chosen;
    p.two_best = c_.two_best;
    p.weights = reinterpret_cast<float*>(weights_.raw());
    p.ids = ids_.get();
    run_within(
        {logits_.extent("logits"), bias_.extent("bias"), weights_.extent("weights", true), ids_.extent("ids", true)},
        c_.text(), [&] { return device::topk_routing(p, nullptr); });
  }

  void check() {
    run();
    for (int t = 0; t < c_.tokens; ++t) check_token(t);
  }

 private:
  void check_token(int t) const {
    std::vector<double> s(c_.experts), chosen_by(c_.experts);
    double top = -INFINITY, total = 0;
    const auto logit = [&](int e) { return logits_.value(t * token_ + e * expert_); };
    for (int e = 0; e < c_.experts; ++e) top = std::max(top, logit(e));
    for (int e = 0; e < c_.experts; ++e) total += std::exp(logit(e) - top);
    for (int e = 0; e < c_.experts; ++e) {
      s[e] = c_.scoring == Scoring::softmax ? std::exp(logit(e) - top) / total : 1 / (1 + std::exp(-logit(e)));
      chosen_by[e] = s[e] + (c_.bias ? bias_[e] : 0);
    }
    const auto descending = [](const std::vector<double>& x) {
      std::vector<int> order(x.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] > x[b]; });
      return order;
    };
    const int size = c_.experts / c_.groups;
    std::vector<double> groups(c_.groups);
    for (int g = 0; g < c_.groups; ++g) {
      std::vector<double> own(chosen_by.begin() + g * size, chosen_by.begin() + (g + 1) * size);
      std::sort(own.rbegin(), own.rend());
      groups[g] = own[0] + (c_.two_best ? own[1] : 0);
    }
    std::vector<bool> stays(c_.groups);
    const std::vector<int> by_group = descending(groups);
    for (int g = 0; g < c_.chosen; ++g) stays[by_group[g]] = true;
    for (int e = 0; e < c_.experts; ++e)
      if (!stays[e / size]) chosen_by[e] = -INFINITY;
    const std::vector<int> best = descending(chosen_by);
    double sum = c_.scoring == Scoring::softmax ? 0 : 1e-20;
    for (int j = 0; j < c_.k; ++j) sum += s[best[j]];
    for (int j = 0; j < c_.k; ++j) {
      CHECK(id(t, j) == best[j], c_.text(), ": token ", t, ", choice ", j, ": ", id(t, j), ", expected ", best[j]);
      const double want = s[best[j]] / (c_.renormalize ? sum : 1) * 2.5;
      CHECK(near(weight(t, j), want, (sizeof(C) == 4 ? 1e-5 : 1e-13) * want), c_.text(), ": token ", t, ", choice ", j,
            ": ", weight(t, j), ", expected ", want);
    }
  }

  const RoutingCase c_;
  int64_t token_, expert_;
  Buffer<T> logits_;
  Buffer<C> weights_;
  Buffer<float> bias_;
  Buffer<int32_t> ids_;
};

template <class T>
void check_options() {
  for (Scoring scoring : {Scoring::softmax, Scoring::sigmoid})
    for (bool renormalize : {true, false})
      for (bool bias : {false, true}) {
        Routing<T>({5, 60, 7, scoring, renormalize, bias}).check();
        Routing<T>({5, 48, 6, scoring, renormalize, bias, false, false, 8, 3}).check();
        Routing<T>({5, 48, 6, scoring, renormalize, bias, true, true, 8, 3}).check();
      }
}
TEST(routing_options_f32) { check_options<float>(); }
TEST(routing_options_f64) { check_options<double>(); }
TEST(routing_options_16_bit) {
  check_options<f16>();
  Routing<bf16>({5, 60, 7}).check();
}

TEST(routing_sizes) {
  Routing<float>({3, 1, 1}).check();
  Routing<float>({2, 40, 40}).check();    // all of them, more than a warp has lanes
  Routing<float>({2, 1024, 8}).check();   // few of these fit into a block
  Routing<float>({1, 30000, 2}).check();  // none: scores are computed anew
  Routing<float>({1, 30000, 2, Scoring::sigmoid, true, true, true, false, 6, 2}).check();
  Routing<float>({0, 8, 2}).check();
}

TEST(routing_ties_go_to_the_lowest) {
  Routing<float>({4, 50, 9}, true).check();
  Routing<float>({4, 48, 6, Scoring::softmax, true, false, false, false, 8, 3}, true).check();
  Routing<float> same({1, 40, 5});
  for (int e = 0; e < 40; ++e) same.logits().set(e, -INFINITY);
  same.logits().set(17, 1);
  same.run();
  CHECK(same.id(0, 0) == 17 && same.weight(0, 0) == 2.5, same.id(0, 0), " ", same.weight(0, 0));
  for (int j = 1; j < 5; ++j) CHECK(same.id(0, j) == j - 1 && same.weight(0, j) == 0, same.id(0, j));
}

TEST(routing_of_nan) {
  for (Scoring scoring : {Scoring::softmax, Scoring::sigmoid}) {
    Routing<float> r({2, 40, 36, scoring});
    for (int e : {0, 3, 39}) r.logits().set(e, NAN);
    r.run();
    std::vector<bool> seen(40);
    for (int j = 0; j < 36; ++j) {
      CHECK(std::isnan(r.weight(0, j)) && !std::isnan(r.weight(1, j)), j);
      CHECK(r.id(0, j) >= 0 && r.id(0, j) < 40 && !seen[r.id(0, j)], r.id(0, j));
      seen[r.id(0, j)] = true;
    }
  }
}

}  // namespace
}  // namespace effops::test
