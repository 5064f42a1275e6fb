// y = f(x) W^T (+ bias) (+ residual) for few rows: one pass over the weights at read bandwidth.
// f is nothing, the norm before the layer or the gated activation.
#pragma once

#include "common/linear_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemv/dot_rows.h"
#include "cpu/gemv/linear_rows.h"

namespace effops::cpu::EFFOPS_ISA {

template <class T>
class LinearTask {
  using P = product_of<T>;
  using V = vec_of<T>;
  using C = typename P::C;

 public:
  LinearTask(const LinearProblem& p, const typename P::Element* x) : p_(p), x_(x) {}

  // Output features [begin, end). Every group of rows reads the features of a stretch before the
  // next stretch comes, so that weights leave memory once.
  void run(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; n += V::width) {
      const int64_t last = std::min<int64_t>(end, n + V::width);
      const typename P::Element* x = x_;
      for (int64_t row = 0; row < p_.rows;)
        by_group(p_.rows - row, [&](auto group) {
          this->template by_features<group()>(n, last, row, x);
          row += group();
          x += padded_k(p_) * group();
        });
    }
  }

  static int64_t padded_k(const LinearProblem& p) { return (p.in + P::kChunk - 1) / P::kChunk * P::kChunk; }

  // Rows of f(x) in dot_rows' layout, group by group. `row` has room for one row.
  static void place(const LinearProblem& p, typename P::Element* x, T* row) {
    for (int64_t first = 0; first < p.rows;)
      by_group(p.rows - first, [&](auto group) {
        for (int m = 0; m < group() && first + m < p.rows; ++m)
          place_query<P, T, group()>(prepared_row(p, first + m, row), 1, p.in, m, x);
        for (int64_t m = p.rows - first; m < group(); ++m) repeat_query<P, group()>(int(m), p.in, x);
        first += group();
        x += padded_k(p) * group();
      });
  }

  // Inputs that eight rows take at a time: theirs stay in the first-level cache for all features of a stretch.
  static constexpr int64_t kStretch = 1024;

  // Eight float32 rows of activations would crowd the first-level cache.
  static constexpr int kLargestGroup = V::width == 16 && P::kPack == 2 ? 8 : 4;

 private:
  // Calls f with the size of the next group of `left` rows: 8 (pairs of bfloat16), 4, 2 or 1, where a
  // group may lack its last row. With vectors of 16 a single row goes as two equal ones: that reads 8
  // features side by side instead of 16, which memory and caches serve up to 1.5 times as fast.
  template <class F>
  static void by_group(int64_t left, F&& f) {
    if constexpr (kLargestGroup == 8)
      if (left >= 7) return f(std::integral_constant<int, 8>());
    if (left >= 3) return f(std::integral_constant<int, 4>());
    if (left == 2 || V::width == 16) return f(std::integral_constant<int, 2>());
    f(std::integral_constant<int, 1>());
  }

  // A stretch of features for a group of MR rows. The first group asks for the next stretch; what the
  // others read is near already.
  template <int MR>
  void by_features(int64_t begin, int64_t end, int64_t first_row, const typename P::Element* x) const {
    if (first_row > 0) return by_features_ahead<MR>(begin, end, first_row, x, NoAhead());
    const int64_t near = MR == 1 ? kNearBytes / 4 / int64_t(sizeof(T)) : 2 * kDotRows<V, MR> * p_.weight_row;
    by_features_ahead<MR>(begin, end, 0, x, Ahead{V::width * p_.weight_row, near, p_.weight_row, 1});
  }

  template <int MR, class A>
  void by_features_ahead(int64_t begin, int64_t end, int64_t first_row, const typename P::Element* x,
                         const A& ahead) const {
    constexpr int NK = kDotRows<V, MR>;
    const T* weight = reinterpret_cast<const T*>(p_.weight);
    auto rows_of = [&](int part, int64_t at, const T*(&row)[NK]) {
      for (int i = 0; i < NK; ++i) row[i] = weight + std::min(begin + part * NK + i, p_.out - 1) * p_.weight_row + at;
    };
    const int parts = static_cast<int>((end - begin + NK - 1) / NK);
    const T* row[NK];
    V y[MR];
    for (V& part : y) part = V::zero();
    if (MR < 8 || p_.in <= kStretch) {
      for (int part = 0; part < parts; ++part) {
        rows_of(part, 0, row);
        y[part] = dot_rows<P, T, MR>(row, p_.in, ahead, InterleavedQuery<P, MR>{x});
      }
    } else {
      V sums[MR][V::width];
      for (auto& part : sums)
        for (V& sum : part) sum = V::zero();
      for (int64_t at = 0; at < p_.in; at += kStretch)
        for (int part = 0; part < parts; ++part) {
          rows_of(part, at, row);
          const InterleavedQuery<P, MR> query{x + at * MR};
          add_dot_rows<P, T, MR>(row, std::min(kStretch, p_.in - at), ahead, query, sums[part]);
        }
      for (int part = 0; part < parts; ++part) y[part] = V::reduce_add_each(sums[part]);
    }
    rows_apart<MR>(y);
    for (int m = 0; m < MR && first_row + m < p_.rows; ++m)
      finish_features<T>(p_, first_row + m, begin, int(end - begin), y[m]);
  }

  const LinearProblem& p_;
  const typename P::Element* x_;
};

// Layer g of those side by side.
template <class T>
LinearProblem layer_of(LinearProblem p, int64_t g) {
  constexpr int64_t size = sizeof(T);
  p.x += g * p.x_group * size;
  p.weight += g * p.weight_group * size;
  if (p.bias != nullptr) p.bias += g * p.bias_group * size;
  if (p.residual != nullptr) p.residual += g * p.residual_group * size;
  p.y += g * p.y_group * size;
  return p;
}

template <class T>
void linear_typed(const LinearProblem& p, const Parallel& parallel) {
  using E = typename product_of<T>::Element;
  using Task = LinearTask<T>;
  const int64_t elements = (p.rows + Task::kLargestGroup) * Task::padded_k(p);
  const int64_t inputs = p.x_group == 0 ? 1 : p.groups;
  Carver measure;
  measure.take<E>(inputs * elements);
  measure.take<T>(p.in);
  Carver carver(thread_scratch(Scratch::call, measure.used()));
  E* x = carver.take<E>(inputs * elements);
  T* row = carver.take<T>(p.in);
  for (int64_t g = 0; g < inputs; ++g) Task::place(layer_of<T>(p, g), x + g * elements, row);
  const int64_t pieces = (p.out + kLinearPiece - 1) / kLinearPiece;
  parallel.for_each(p.groups * pieces, linear_worth_threads(p), [&](int64_t i) {
    const int64_t g = i / pieces, n = i % pieces * kLinearPiece;
    const LinearProblem own = layer_of<T>(p, g);
    Task(own, x + (inputs == 1 ? 0 : g * elements)).run(n, std::min(p.out, n + kLinearPiece));
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
