// The experts of one token, chosen by a warp: K times the best of what comes after the last one chosen, in the
// descending order of scores with ties by number. Nothing is marked, so that scores may also be computed anew each
// time.
#pragma once

#include <climits>

#include "common/moe_problem.h"
#include "primitives/divide.h"
#include "primitives/element.h"
#include "primitives/reduce.h"

namespace effops::device {

struct RoutingParams {
  RoutingProblem p;
  FastDivide group;  // experts a group
  bool kept;         // selection values of a token stay in shared memory
};

template <class C>
struct Candidate {
  C value = -static_cast<C>(INFINITY);
  int id = INT_MAX;

  __device__ bool before(C v, int i) const { return value > v || (value == v && id < i); }
};

// The first of [0, count) after `last`; `value` has no NaN.
template <class C, class Value>
__device__ Candidate<C> first_after(const Candidate<C>& last, int count, Value&& value) {
  Candidate<C> best;
  for (int i = lane_index(); i < count; i += kWarp) {
    const C v = value(i);
    if (last.before(v, i) && !best.before(v, i)) best = {v, i};
  }
  EFFOPS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const C v = __shfl_xor_sync(kAllLanes, best.value, step);
    const int i = __shfl_xor_sync(kAllLanes, best.id, step);
    if (!best.before(v, i)) best = {v, i};
  }
  return best;
}

template <class T>
class RoutingToken {
 public:
  using C = Compute<T>;

  __device__ RoutingToken(const RoutingParams& a, int64_t token, C* shared)
      : a_(a),
        p_(a.p),
        logits_(reinterpret_cast<const T*>(p_.logits) + token * p_.token),
        weights_(reinterpret_cast<C*>(p_.weights) + token * p_.k),
        ids_(p_.ids + token * p_.k),
        groups_(shared),
        values_(shared + p_.groups),
        experts_(static_cast<int>(p_.experts)) {}

  // Elements of shared memory.
  EFFOPS_HD static int64_t shared_items(const RoutingProblem& p, bool kept) {
    return p.groups + (kept ? p.experts : 0);
  }

  __device__ void run() {
    look();
    if (a_.kept) keep();
    if (limited()) limit_groups();
    Candidate<C> last{static_cast<C>(INFINITY), -1};
    for (int j = 0; j < p_.k; ++j) {
      last = first_after(last, experts_, [&](int e) { return a_.kept ? values_[e] : value(e); });
      if (lane_index() == j % kWarp) ids_[j] = last.id;
    }
    weigh();
  }

 private:
  __device__ bool limited() const { return p_.chosen_groups < p_.groups; }
  // Scores rise with logits, which therefore serve where only the order counts.
  __device__ bool by_score() const { return p_.bias != nullptr || (p_.two_best && limited()); }
  __device__ bool softmax() const { return p_.scoring == Scoring::softmax; }
  __device__ C logit(int e) const { return widen(logits_[e * p_.expert]); }
  __device__ static C sigmoid(C x) { return C(1) / (C(1) + exp_of(-x)); }

  // The largest logit, the softmax's denominator, and whether a logit is NaN.
  __device__ void look() {
    bool flaw = false;
    for (int e = lane_index(); e < experts_; e += kWarp) {
      const C x = logit(e);
      flaw = flaw || x != x;
      top_ = max_of(top_, x);
    }
    flaw_ = __any_sync(kAllLanes, flaw);
    top_ = reduce_lanes<kWarp>(top_, Max());
    if (!softmax() || (p_.renormalize && !by_score())) return;
    for (int e = lane_index(); e < experts_; e += kWarp) total_ += exp_of(logit(e) - top_);
    total_ = reduce_lanes<kWarp>(total_, Sum());
  }

  // What the selection compares: at least the lowest finite number, for NaN too.
  __device__ C score(int e) const {
    C x = logit(e);
    if (by_score()) x = softmax() ? exp_of(x - top_) / total_ : sigmoid(x);
    if (p_.bias != nullptr) x += static_cast<C>(p_.bias[e]);
    constexpr C lowest = static_cast<C>(sizeof(C) == 4 ? -3.402823466e38 : -1.7976931348623157e308);
    return x > lowest ? x : lowest;
  }
  __device__ bool stays(int group) const { return !edge_.before(groups_[group], group); }
  __device__ C value(int e) const {
    return limited() && !stays(static_cast<int>(a_.group.quotient(e))) ? -static_cast<C>(INFINITY) : score(e);
  }

  __device__ void keep() {
    for (int e = lane_index(); e < experts_; e += kWarp) values_[e] = score(e);
    __syncwarp();
  }

  __device__ void limit_groups() {
    const int size = static_cast<int>(a_.group.divisor);
    for (int g = lane_index(); g < p_.groups; g += kWarp) {
      C best = -static_cast<C>(INFINITY), second = best;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        const C x = a_.kept ? values_[e] : score(e);
        second = max_of(second, min_of(best, x));
        best = max_of(best, x);
      }
      groups_[g] = p_.two_best ? best + second : best;
    }
    __syncwarp();
    Candidate<C> last{static_cast<C>(INFINITY), -1};
    for (int i = 0; i < p_.chosen_groups; ++i)
      last = first_after(last, static_cast<int>(p_.groups), [&](int g) { return groups_[g]; });
    edge_ = last;
    if (!a_.kept) return;
    for (int e = lane_index(); e < experts_; e += kWarp)
      if (!stays(static_cast<int>(a_.group.quotient(e)))) values_[e] = -static_cast<C>(INFINITY);
    __syncwarp();
  }

  __device__ void weigh() const {
    C top = top_, sum = 0;
    if (p_.renormalize) {  // over the chosen alone, so that the sum is no less than one
      top = -static_cast<C>(INFINITY);
      for (int j = lane_index(); j < p_.k; j += kWarp) top = max_of(top, logit(ids_[j]));
      top = reduce_lanes<kWarp>(top, Max());
      for (int j = lane_index(); j < p_.k; j += kWarp) sum += weight(ids_[j], top);
      sum = reduce_lanes<kWarp>(sum, Sum());
      if (!softmax()) sum += static_cast<C>(1e-20);
    }
    const C divisor = p_.renormalize ? sum : softmax() ? total_ : C(1);
    for (int j = lane_index(); j < p_.k; j += kWarp)
      weights_[j] = flaw_ ? static_cast<C>(NAN) : weight(ids_[j], top) / divisor * static_cast<C>(p_.scale);
  }
  __device__ C weight(int e, C top) const { return softmax() ? exp_of(logit(e) - top) : sigmoid(logit(e)); }

  const RoutingParams& a_;
  const RoutingProblem& p_;
  const T* logits_;
  C* weights_;
  int32_t* ids_;
  C *groups_, *values_;
  int experts_;
  C top_ = -static_cast<C>(INFINITY), total_ = 0;
  Candidate<C> edge_;  // the last group that stays
  bool flaw_ = false;
};

}  // namespace effops::device
