// y = x W^T (+ bias) (+ residual) for few rows: one pass over the weights at read bandwidth.
#pragma once

#include "common/linear_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemv/dot_rows.h"

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
      int64_t row = 0;
      const typename P::Element* x = x_;
      for (; p_.rows - row >= 3; row += 4, x += padded_k(p_) * 4) by_features<4>(n, last, row, x);
      if (p_.rows - row == 2) by_features<2>(n, last, row, x);
      if (p_.rows - row == 1) by_features<1>(n, last, row, x);
    }
  }

  static int64_t padded_k(const LinearProblem& p) { return (p.in + P::kChunk - 1) / P::kChunk * P::kChunk; }

  // Rows of x in dot_rows' layout, in groups of 4, 4, ..., then 2 or 1; three left fill a group of 4.
  static void place(const LinearProblem& p, typename P::Element* x) {
    const int64_t k = padded_k(p);
    int64_t row = 0;
    for (; p.rows - row >= 3; row += 4, x += k * 4)
      for (int m = 0; m < 4; ++m) place_query<P, T, 4>(at(p, std::min(row + m, p.rows - 1)), p.x_stride, p.in, m, x);
    if (p.rows - row == 2)
      for (int m = 0; m < 2; ++m) place_query<P, T, 2>(at(p, row + m), p.x_stride, p.in, m, x);
    if (p.rows - row == 1) place_query<P, T, 1>(at(p, row), p.x_stride, p.in, 0, x);
  }

 private:
  static const T* at(const LinearProblem& p, int64_t row) { return reinterpret_cast<const T*>(p.x) + row * p.x_row; }

  template <int MR>
  void by_features(int64_t begin, int64_t end, int64_t first_row, const typename P::Element* x) const {
    constexpr int NK = kDotRows<V, MR>;
    const T* weight = reinterpret_cast<const T*>(p_.weight);
    const Ahead ahead{NK * p_.weight_row, kNearBytes / 4 / int64_t(sizeof(T)), p_.weight_row, 1};
    for (int64_t n = begin; n < end; n += NK) {
      const T* row[NK];
      for (int i = 0; i < NK; ++i) row[i] = weight + std::min(n + i, p_.out - 1) * p_.weight_row;
      C y[V::width];
      dot_rows<P, T, MR>(row, p_.in, ahead, x).store(y);
      for (int m = 0; m < MR && first_row + m < p_.rows; ++m)
        finish(first_row + m, n, std::min<int64_t>(NK, end - n), y + m, MR);
    }
  }

  void finish(int64_t row, int64_t n, int64_t count, const C* y, int stride) const {
    T* to = reinterpret_cast<T*>(p_.y) + row * p_.out + n;
    const T* bias = reinterpret_cast<const T*>(p_.bias);
    const T* residual = reinterpret_cast<const T*>(p_.residual);
    if (residual != nullptr) residual += row * p_.residual_row + n;
    for (int64_t i = 0; i < count; ++i) {
      C v = y[i * stride];
      if (bias != nullptr) v += to_float(bias[n + i]);
      if (residual != nullptr) v += to_float(residual[i]);
      if constexpr (sizeof(T) == 8) {
        to[i] = v;
      } else {
        to[i] = from_float<T>(v);
      }
    }
  }

  const LinearProblem& p_;
  const typename P::Element* x_;
};

template <class T>
void linear_typed(const LinearProblem& p, const Parallel& parallel) {
  using E = typename product_of<T>::Element;
  using Task = LinearTask<T>;
  const int64_t groups = (p.rows + 3) / 4;
  E* x = static_cast<E*>(thread_scratch(Scratch::call, groups * 4 * Task::padded_k(p) * sizeof(E)));
  Task::place(p, x);
  const int64_t pieces = (p.out + kLinearPiece - 1) / kLinearPiece;
  parallel.for_each(pieces, linear_worth_threads(p),
                    [&](int64_t i) { Task(p, x).run(i * kLinearPiece, std::min(p.out, (i + 1) * kLinearPiece)); });
}

}  // namespace effops::cpu::EFFOPS_ISA
