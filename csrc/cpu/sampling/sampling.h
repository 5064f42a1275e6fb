// The law of a next token and the draw from it: temperature, top-k, top-p, min-p, inverse CDF in id order.
//
// A row is read once for its maximum, kept a block of ids. Every filter is a prefix of the descending
// order of the logits, ties by id, so that top-k is exact and no two filters disagree about the order.
// Where one is on, only the tokens that it can keep are looked at again; they are listed in id order.
// Weights are relative to the maximum and never normalised: the ratios that filters and draws compare
// are the same, and each later filter divides by what the one before it left.
#pragma once

#include <functional>
#include <limits>

#include "common/sampling_problem.h"
#include "cpu/layer/layer.h"
#include "cpu/sampling/select.h"

namespace effops::cpu::EFFOPS_ISA {

// In double, in an order that does not depend on the width of vectors.
template <class C>
inline double sum_of(const C* x, int64_t count) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] += x[i];
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int j = 0; j < w; ++j) lanes[j] += lanes[j + w];
  return lanes[0];
}

template <class T>
class SamplingRow {
  using V = vec_of<T>;
  using C = typename V::scalar;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();

 public:
  SamplingRow(const SamplingProblem& p, const T* x)
      : p_(p), x_(x), block_(p.size < 1 << 14 ? 64 : 256), blocks_((p.size + block_ - 1) / block_) {
    for (bool placed : {false, true}) {
      Carver carver(placed ? thread_scratch(Scratch::task, bytes_) : nullptr);
      tops_ = carver.template take<C>(blocks_);
      sums_ = carver.template take<double>(blocks_);
      weights_ = carver.template take<C>(p.size);
      masses_ = carver.template take<C>(p.size);
      order_ = carver.template take<OrderBits<C>>(p.size);
      ids_ = carver.template take<int32_t>(p.size);
      bytes_ = carver.used();
    }
  }

  // The maxima of the blocks; says why the row has no law where it has none.
  RowFlaw look() {
    V flawed = V::zero();
    top_ = -kInfinity;
    for (int64_t b = 0; b < blocks_; ++b) {
      V most = V::set1(-kInfinity);
      int64_t i = b * block_;
      for (; i + V::width <= end_of(b); i += V::width) {
        const V x = V::load(x_ + i);
        most = max(x, most);
        flawed = max(flawed, where_less(x, V::set1(kInfinity), V::zero(), V::set1(1)));
      }
      tops_[b] = first_lane(V::template fold_max<1>(most));
      for (; i < end_of(b); ++i) {
        if (!(logit(i) < kInfinity)) flawed = V::set1(1);
        tops_[b] = std::max(tops_[b], logit(i));
      }
      top_ = std::max(top_, tops_[b]);
    }
    if (first_lane(V::template fold_max<1>(flawed)) == 0) return top_ > -kInfinity ? RowFlaw::none : RowFlaw::empty;
    for (int64_t i = 0; i < p_.size; ++i)
      if (logit(i) != logit(i)) return RowFlaw::nan;
    return RowFlaw::infinite;
  }

  // The first of equal maxima.
  int64_t greedy() const {
    int64_t i = block_ * (std::find(tops_, tops_ + blocks_, top_) - tops_);
    while (logit(i) != top_) ++i;
    return i;
  }

  // The likeliest tokens in descending order, of equals the lower id first.
  void best(int64_t count, int64_t* ids) {
    list_above(count);
    auto before = [&](int32_t a, int32_t b) { return logit(a) > logit(b) || (logit(a) == logit(b) && a < b); };
    std::partial_sort(ids_, ids_ + count, ids_ + count_, before);
    std::copy(ids_, ids_ + count, ids);
  }

  void filter() {
    if (p_.top_k > 0 && p_.top_k < p_.size) {
      list_top_k();
    } else {
      weigh_all();
    }
    if (p_.top_p < 1) {
      if (!listed_) {
        // The tokens below this weight have less than half of the mass that top-p may drop.
        const double least = (1 - p_.top_p) / 2 * total_ / static_cast<double>(p_.size);
        list_weights(least);
      }
      std::copy(weights_, weights_ + count_, masses_);
      cut(p_.top_p * total_);
    }
    if (p_.min_p > 0) {  // the largest weight is 1
      if (listed_) {
        retain([&](int64_t i) { return weights_[i] >= p_.min_p; });
      } else {
        list_weights(p_.min_p);
      }
    }
    if (listed_) total_ = sum_of(weights_, count_);
  }

  // The first token whose sum of weights, its own included, exceeds u of the whole. One of weight zero
  // adds nothing and is never it; where rounding leaves the sum short, it is the last that adds something.
  int64_t draw(double u) const {
    const double target = u * total_;
    double before = 0;
    int64_t begin = 0, end = count_;
    if (!listed_) {
      double sum = 0;
      for (int64_t b = 0; b < blocks_ && sum <= target; ++b) {
        if (sums_[b] == 0) continue;
        before = sum;
        sum += sums_[b];
        begin = b * block_;
        end = end_of(b);
      }
    }
    int64_t last = begin;
    for (int64_t i = begin; i < end && before <= target; ++i) {
      if (weights_[i] == 0) continue;
      last = i;
      before += weights_[i];
    }
    return listed_ ? ids_[last] : last;
  }

  void law(C* y) const {
    const double factor = 1 / total_;
    if (listed_) {
      std::fill(y, y + p_.size, C(0));
      for (int64_t i = 0; i < count_; ++i) y[ids_[i]] = static_cast<C>(weights_[i] * factor);
    } else {
      for (int64_t i = 0; i < p_.size; ++i) y[i] = static_cast<C>(weights_[i] * factor);
    }
  }

 private:
  C logit(int64_t i) const { return static_cast<C>(to_float(x_[i])); }
  int64_t end_of(int64_t block) const { return std::min(p_.size, (block + 1) * block_); }
  static C first_lane(V x) {
    C lanes[V::width];
    x.store(lanes);
    return lanes[0];
  }

  // exp((x - maximum) / temperature). The factor stays a normal number, so that zero and infinity times
  // it are themselves.
  template <class From>
  void weigh(const From* x, int64_t count, C* weights) const {
    constexpr double least = std::numeric_limits<C>::min(), most = std::numeric_limits<C>::max();
    const V top = V::set1(top_), factor = V::set1(static_cast<C>(std::clamp(1 / p_.temperature, least, most)));
    for_vectors<V>(count, [&](int64_t i, int n) {
      store_n(exp_of_negative((load_some<V>(x + i, n) - top) * factor), weights + i, n);
    });
  }

  void weigh_all() {
    total_ = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t begin = b * block_, count = end_of(b) - begin;
      weigh(x_ + begin, count, weights_ + begin);
      sums_[b] = sum_of(weights_ + begin, count);
      total_ += sums_[b];
    }
  }

  // Lists the ids, in order, that keep() names in blocks that may have some.
  template <class Block, class Keep>
  void list(Block&& may_have, Keep&& keep) {
    listed_ = true;
    count_ = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      if (!may_have(b)) continue;
      for (int64_t i = b * block_; i < end_of(b); ++i) {
        ids_[count_] = static_cast<int32_t>(i);
        count_ += keep(i);
      }
    }
  }

  // The weights move up to their ids in the list: not past one that is still to be read.
  void list_weights(double least) {
    list([&](int64_t b) { return sums_[b] >= least; }, [&](int64_t i) { return weights_[i] >= least; });
    for (int64_t i = 0; i < count_; ++i) weights_[i] = weights_[ids_[i]];
  }

  // Lists the `count` likeliest tokens and some more. As many blocks have their maximum at or above the bound: so have
  // the tokens.
  void list_above(int64_t count) {
    C bound = -kInfinity;
    if (count <= blocks_) {
      std::copy(tops_, tops_ + blocks_, masses_);
      std::nth_element(masses_, masses_ + count - 1, masses_ + blocks_, std::greater<C>());
      bound = masses_[count - 1];
    }
    list([&](int64_t b) { return tops_[b] >= bound; }, [&](int64_t i) { return logit(i) >= bound; });
  }

  void list_top_k() {
    list_above(p_.top_k);
    std::fill(masses_, masses_ + count_, C(1));
    cut(static_cast<double>(p_.top_k));
    for (int64_t i = 0; i < count_; ++i) weights_[i] = logit(ids_[i]);
    weigh(weights_, count_, weights_);
    total_ = sum_of(weights_, count_);
  }

  // Leaves the smallest prefix of the list's descending order that has `enough` of the masses.
  void cut(double enough) {
    for (int64_t i = 0; i < count_; ++i) order_[i] = order_bits(logit(ids_[i]));
    Edge<C> edge = edge_of(order_, masses_, count_, enough);
    retain([&](int64_t i) {
      const OrderBits<C> at = order_bits(logit(ids_[i]));
      bool stays = at > edge.at;
      if (at == edge.at) [[unlikely]]
        stays = edge.ties-- > 0;
      return stays;
    });
  }

  template <class Keep>
  void retain(Keep&& keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const bool stays = keep(i);
      ids_[kept] = ids_[i];
      weights_[kept] = weights_[i];
      kept += stays;
    }
    count_ = kept;
  }

  const SamplingProblem& p_;
  const T* x_;
  int64_t block_, blocks_;  // multiples of every vector's width
  size_t bytes_ = 0;
  C *tops_ = nullptr, *weights_ = nullptr, *masses_ = nullptr, top_ = 0;
  double *sums_ = nullptr, total_ = 0;
  OrderBits<C>* order_ = nullptr;
  int32_t* ids_ = nullptr;  // of a list, whose weights are the first count_
  int64_t count_ = 0;
  bool listed_ = false;
};

template <class T>
void sampling_typed(const SamplingProblem& p, const Parallel& parallel) {
  using C = typename vec_of<T>::scalar;
  for_rows(parallel, p.rows.rows(), p.size, [&](int64_t row) {
    SamplingRow<T> r(p, reinterpret_cast<const T*>(p.x) + p.rows.offset(row));
    const RowFlaw flaw = r.look();
    if (flaw != RowFlaw::none) return p.flawed->report(row, flaw);
    if (p.best > 0) return r.best(p.best, p.tokens + row * p.best);
    auto law = [&] { return reinterpret_cast<C*>(p.probs) + row * p.size; };
    if (p.temperature > 0) {
      r.filter();
      p.tokens != nullptr ? void(p.tokens[row] = r.draw(p.uniforms[row])) : r.law(law());
    } else if (p.tokens != nullptr) {
      p.tokens[row] = r.greedy();
    } else {
      std::fill(law(), law() + p.size, C(0));
      law()[r.greedy()] = 1;
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
