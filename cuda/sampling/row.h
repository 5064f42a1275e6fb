// The law of one row's next token, as csrc/cpu/sampling has it. A block has the row; nothing but the logits is in
// memory, and every filter is an edge in their descending order, ties by id.
#pragma once

#include <bit>

#include "common/sampling_problem.h"
#include "primitives/element.h"
#include "sampling/find.h"
#include "sampling/select.h"

namespace effops::device {

template <class T>
class SamplingRow {
 public:
  using C = Compute<T>;
  static constexpr int kCount = kItems16<T>;
  static constexpr int kSharedBytes = kWarp * sizeof(double) + Histogram::kSharedBytes;

  __device__ SamplingRow(const SamplingProblem& p, int64_t row, bool pieces)
      : p_(p),
        x_(reinterpret_cast<const T*>(p.x) + p.rows.offset(row)),
        pieces_(pieces),
        scratch_(reinterpret_cast<double*>(shared_memory())),
        histogram_(shared_memory() + kWarp * sizeof(double)) {}

  // The maximum and the first id that has it; says why the row has no law where it has none.
  __device__ RowFlaw look() {
    C top = -static_cast<C>(INFINITY);
    int64_t first = p_.size;
    int flaws = 0;
    each([&](int64_t i, C x) {
      if (x != x) flaws |= 2;
      if (x == static_cast<C>(INFINITY)) flaws |= 1;
      if (x > top) {
        top = x;
        first = i;
      }
    });
    top_ = reduce_block(top, Max(), top, reinterpret_cast<C*>(scratch_));
    first_ = -reduce_block(top == top_ ? -first : -p_.size, Max(), -p_.size, reinterpret_cast<int64_t*>(scratch_));
    flaws = reduce_block(flaws, Max(), 0, reinterpret_cast<int*>(scratch_));
    if (flaws >= 2) return RowFlaw::nan;
    if (flaws == 1) return RowFlaw::infinite;
    return top_ > -static_cast<C>(INFINITY) ? RowFlaw::none : RowFlaw::empty;
  }

  __device__ int64_t greedy() const { return first_; }

  __device__ void filter() {
    // A normal number, so that zero and infinity times it are themselves.
    constexpr double kLeast = sizeof(C) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308;
    constexpr double kMost = sizeof(C) == 4 ? 3.402823466e38 : 1.7976931348623157e308;
    factor_ = static_cast<C>(clamp_to(1 / p_.temperature, kLeast, kMost));
    if (p_.top_k > 0 && p_.top_k < p_.size) {
      cut(static_cast<Mass>(p_.top_k), [](C) { return Mass(1); });
    }
    if (p_.top_p < 1) {
      const double scale = std::bit_cast<double>(uint64_t(1023 + 62 - bits_of(p_.size)) << 52);
      auto mass = [&](C x) { return static_cast<Mass>(static_cast<double>(weigh(x)) * scale); };
      Mass total = 0;
      each([&](int64_t i, C x) { total += keeps(i, x) ? mass(x) : 0; });
      total = reduce_block(total, Sum(), Mass(0), reinterpret_cast<Mass*>(scratch_));
      const double goal = p_.top_p * static_cast<double>(total);
      Mass enough = static_cast<Mass>(goal);
      if (static_cast<double>(enough) < goal) ++enough;
      cut(max_of(enough, Mass(1)), mass);
    }
    least_ = static_cast<double>(p_.min_p);
    double total = 0;
    each([&](int64_t i, C x) { total += static_cast<double>(weight(i, x)); });
    total_ = reduce_block(total, Sum(), 0.0, scratch_);
  }

  // The first token whose sum of weights, its own included, exceeds u of the whole. One of weight zero adds nothing and
  // is never it; where rounding leaves the sum short, it is the last that adds something.
  __device__ int64_t draw(double u) const {
    return find_sum(p_.size, u * total_, scratch_,
                    [&](int64_t i) { return static_cast<double>(weight(i, widen(x_[i]))); });
  }

  __device__ void law(C* y) const {
    const double factor = 1 / total_;
    for (int64_t i = threadIdx.x; i < p_.size; i += blockDim.x)
      y[i] = static_cast<C>(static_cast<double>(weight(i, widen(x_[i]))) * factor);
  }

 private:
  // f(id, logit) for this thread's share, the same however the row lies.
  template <class F>
  __device__ void each(F&& f) const {
    for (int64_t i = int64_t(threadIdx.x) * kCount; i < p_.size; i += int64_t(blockDim.x) * kCount) {
      const int64_t count = p_.size - i;
      const auto items = Items<T, kCount>::load_some(x_ + i, count, pieces_);
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e)
        if (e < count) f(i + e, widen(items.item[e]));
    }
  }

  __device__ static int bits_of(int64_t count) {
    int bits = 0;
    while (count >> bits) ++bits;
    return bits;
  }

  __device__ C weigh(C x) const { return exp_of((x - top_) * factor_); }
  __device__ bool keeps(int64_t i, C x) const {
    const OrderBits<C> order = order_bits(x);
    return order > edge_ || (order == edge_ && i <= last_);
  }
  __device__ C weight(int64_t i, C x) const {
    if (!keeps(i, x)) return 0;
    const C w = weigh(x);
    return static_cast<double>(w) >= least_ ? w : 0;
  }

  // Keeps the smallest prefix of the descending order that has `enough` of the masses.
  template <class MassOf>
  __device__ void cut(Mass enough, MassOf&& mass) {
    const Edge<C> edge = find_edge<C>(
        enough, histogram_, [&](auto&& take) { each([&](int64_t i, C x) { take(x, keeps(i, x) ? mass(x) : 0); }); });
    const Mass one = mass(value_of<C>(edge.at));
    const Mass ties = one > 0 ? (edge.equals + one - 1) / one : 1;
    const int64_t last = find_sum(p_.size, static_cast<double>(ties) - 1, scratch_, [&](int64_t i) {
      const C x = widen(x_[i]);
      return order_bits(x) == edge.at && keeps(i, x) ? 1.0 : 0.0;
    });
    edge_ = edge.at;
    last_ = last;
  }

  const SamplingProblem& p_;
  const T* x_;
  bool pieces_;
  double* scratch_;
  Histogram histogram_;
  C top_ = 0, factor_ = 1;
  int64_t first_ = 0;
  OrderBits<C> edge_ = 0;  // of what the filters keep, and the last id of those equal to it
  int64_t last_ = INT64_MAX;
  double least_ = 0, total_ = 0;
};

}  // namespace effops::device
