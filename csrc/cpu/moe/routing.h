// Routing: every lane of a vector is a token, so that selection and normalisation need no sum across lanes, and a
// token's bits depend on nothing but its own logits.
#pragma once

#include <limits>

#include "common/moe_problem.h"
#include "cpu/layer/layer.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
class RoutingTile {  // of up to V::width tokens
  using V = vec_of<T>;
  using C = typename V::scalar;
  static constexpr int W = V::width;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();

 public:
  explicit RoutingTile(const RoutingProblem& p)
      : p_(p), padded_((p.experts + W - 1) / W * W), group_(p.experts / std::max<int64_t>(1, p.groups)) {
    size_t bytes = 0;
    for (bool placed : {false, true}) {
      Carver carver(placed ? thread_scratch(Scratch::task, bytes) : nullptr);
      logits_ = carver.template take<C>(padded_ * W);
      select_ = carver.template take<C>(padded_ * W);
      best_ = carver.template take<C>(p.k * W);
      ids_ = carver.template take<C>(p.k * W);
      groups_ = carver.template take<C>(p.groups * W);
      weights_ = carver.template take<C>(p.k * W);
      row_ = carver.template take<C>(padded_);
      bytes = carver.used();
    }
  }

  void run(int64_t first, int count) {
    load(first, count);
    score();
    if (p_.chosen_groups < p_.groups) limit_groups();
    choose(count == 1);
    weigh();
    write(first, count);
  }

 private:
  static V at(const C* list, int64_t i) { return V::load(list + i * W); }
  static void put(C* list, int64_t i, V x) { x.store(list + i * W); }

  // Lanes beyond the last token repeat it.
  void load(int64_t first, int count) {
    const T* rows[W];
    for (int i = 0; i < W; ++i)
      rows[i] = reinterpret_cast<const T*>(p_.logits) + (first + std::min(i, count - 1)) * p_.token;
    if (p_.expert != 1) {
      for (int i = 0; i < W; ++i) {
        copy_row(rows[i], p_.expert, p_.experts, row_);
        for (int64_t e = 0; e < p_.experts; ++e) logits_[e * W + i] = row_[e];
      }
      return;
    }
    for (int64_t e = 0; e < p_.experts; e += W) {
      V block[W];
      const int n = static_cast<int>(std::min<int64_t>(W, p_.experts - e));
      for (int i = 0; i < W; ++i) block[i] = load_some<V>(rows[i] + e, n);
      V::transpose(block);
      for (int i = 0; i < W; ++i) put(logits_, e + i, block[i]);
    }
  }

  // What the selection compares, at least the lowest finite number. Scores rise with logits, so that these serve where
  // only the order counts; `total_` is the softmax's denominator where weights or scores need it.
  void score() {
    const bool softmax = p_.scoring == Scoring::softmax;
    const bool by_score = p_.bias != nullptr || (p_.two_best && p_.chosen_groups < p_.groups);
    V top = V::set1(-kInfinity), flaw = V::zero();
    for (int64_t e = 0; e < p_.experts; ++e) {
      const V x = at(logits_, e);
      top = max(x, top);
      flaw = where_less(x, V::set1(1), flaw, where_less(V::zero(), x, flaw, V::set1(1)));
    }
    top_ = top;
    flaw_ = flaw;
    const bool sums = softmax && (by_score || !p_.renormalize);
    if (sums) {
      V total = V::zero();
      for (int64_t e = 0; e < p_.experts; ++e) {
        const V weight = exp_of_negative(at(logits_, e) - top);
        put(select_, e, weight);
        total = total + weight;
      }
      total_ = total;
    }
    const V lowest = V::set1(std::numeric_limits<C>::lowest());
    for (int64_t e = 0; e < p_.experts; ++e) {
      V x = at(logits_, e);
      if (by_score) x = softmax ? at(select_, e) / total_ : sigmoid(x);
      if (p_.bias != nullptr) x = x + V::set1(static_cast<C>(p_.bias[e]));
      put(select_, e, max(x, lowest));
    }
  }

  // Experts of groups that do not stay fall to -inf, below all others.
  void limit_groups() {
    for (int64_t g = 0; g < p_.groups; ++g) {
      V best = V::set1(-kInfinity), second = best;
      for (int64_t e = g * group_; e < (g + 1) * group_; ++e) {
        const V x = at(select_, e);
        second = max(second, min(best, x));
        best = max(best, x);
      }
      put(groups_, g, p_.two_best ? best + second : best);
    }
    for (int64_t g = 0; g < p_.groups; ++g) {  // a group stays if fewer than chosen_groups come before it
      const V own = at(groups_, g), one = V::set1(1);
      V before = V::zero();
      for (int64_t other = 0; other < p_.groups; ++other) {
        const V score = at(groups_, other);
        before = before + (other < g ? where_less(score, own, V::zero(), one) : where_less(own, score, one, V::zero()));
      }
      for (int64_t e = g * group_; e < (g + 1) * group_; ++e)
        put(select_, e,
            where_less(before, V::set1(static_cast<C>(p_.chosen_groups)), at(select_, e), V::set1(-kInfinity)));
    }
  }

  // Inserts experts, the last one first, into lists of the k best: of equals the later comer, with its lower id, goes
  // before the others.
  void choose(bool alone) {
    for (int64_t j = 0; j < p_.k; ++j) {
      put(best_, j, V::set1(-kInfinity));
      put(ids_, j, V::zero());
    }
    for (int64_t e = p_.experts; e-- > 0;) {
      if (alone && select_[e * W] < best_[(p_.k - 1) * W]) continue;
      V x = at(select_, e), id = V::set1(static_cast<C>(e));
      for (int64_t j = 0; j < p_.k; ++j) {
        const V held = at(best_, j), holder = at(ids_, j);
        put(best_, j, where_less(x, held, held, x));
        put(ids_, j, where_less(x, held, holder, id));
        id = where_less(x, held, id, holder);
        x = where_less(x, held, x, held);
      }
    }
  }

  void weigh() {
    V sum = V::zero(), top = V::set1(-kInfinity);
    const bool softmax = p_.scoring == Scoring::softmax;
    for (int64_t j = 0; j < p_.k; ++j) {
      for (int i = 0; i < W; ++i) weights_[j * W + i] = logits_[static_cast<int64_t>(ids_[j * W + i]) * W + i];
      top = max(at(weights_, j), top);
    }
    if (!p_.renormalize) top = top_;  // of all experts, as total_ is
    for (int64_t j = 0; j < p_.k; ++j) {
      const V x = at(weights_, j), weight = softmax ? exp_of_negative(x - top) : sigmoid(x);
      put(weights_, j, weight);
      sum = sum + weight;
    }
    if (!softmax) sum = sum + V::set1(C(1e-20));
    const V scale = V::set1(static_cast<C>(p_.scale)), one = V::set1(1);
    const V divisor = p_.renormalize ? sum : softmax ? total_ : one;
    const V nan = V::set1(std::numeric_limits<C>::quiet_NaN());
    for (int64_t j = 0; j < p_.k; ++j) put(weights_, j, where_less(flaw_, one, at(weights_, j) / divisor * scale, nan));
  }

  void write(int64_t first, int count) const {
    C* weights = reinterpret_cast<C*>(p_.weights);
    for (int i = 0; i < count; ++i)
      for (int64_t j = 0; j < p_.k; ++j) {
        weights[(first + i) * p_.k + j] = weights_[j * W + i];
        p_.ids[(first + i) * p_.k + j] = static_cast<int32_t>(ids_[j * W + i]);
      }
  }

  const RoutingProblem& p_;
  int64_t padded_, group_;
  // [experts, W], [k, W] and [groups, W] but for row_, which is one token's.
  C *logits_ = nullptr, *select_ = nullptr, *best_ = nullptr, *ids_ = nullptr, *groups_ = nullptr, *weights_ = nullptr,
    *row_ = nullptr;
  V top_, total_, flaw_;  // flaw_: 1 where a logit is NaN
};

template <class T>
void routing_typed(const RoutingProblem& p, const Parallel& parallel) {
  constexpr int W = vec_of<T>::width;
  for_rows(parallel, (p.tokens + W - 1) / W, W * p.experts * (4 + p.k), [&](int64_t tile) {
    const int64_t first = tile * W;
    RoutingTile<T>(p).run(first, static_cast<int>(std::min<int64_t>(W, p.tokens - first)));
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
