// y = f(x) W^T (+ bias) (+ residual) with a quantised W: one pass over its bytes. Floor: those bytes at read bandwidth
// for few rows, multiplications for many. A number costs three operations: a mask (or a widening load), a conversion
// and the multiply-add; its step and zero cost one of each a group.
#pragma once

#include "common/packed_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemv/linear_rows.h"
#include "cpu/simd/words.h"

namespace effops::cpu::EFFOPS_ISA {

// Fields of a word are not shifted to its low end: what a number is too large by, the query is made smaller by.
template <int NV>
struct Int4Steps {
  static constexpr int64_t kBytes = kPackedPanel * 4;  // of kPackedSteps inputs
  static constexpr int64_t kColumnBytes = 4;
  static float smaller(int64_t k) { return 1.0f / static_cast<float>(1 << (k % 4 * 4)); }

  Words words[NV];
  explicit Int4Steps(const char* at) {
    for (int j = 0; j < NV; ++j) words[j] = Words::load(at + j * Vec::width * kColumnBytes);
  }
  void step(const char*, int i, Vec (&y)[NV]) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if (i == 4) words[j] = words[j].upper_half();
      y[j] = words[j].masked(15 << (i % 4 * 4));
    }
  }
};

template <int NV>
struct Int8Steps {
  static constexpr int64_t kBytes = kPackedPanel * kPackedSteps;
  static constexpr int64_t kColumnBytes = 1;
  static float smaller(int64_t) { return 1; }

  explicit Int8Steps(const char*) {}
  void step(const char* at, int i, Vec (&y)[NV]) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      y[j] = Vec::load(reinterpret_cast<const int8_t*>(at) + i * kPackedPanel + j * Vec::width);
  }
};

// MR rows against NV vectors of a panel's features; `x` is [inputs][MR].
template <template <int> class Steps, int MR, int NV>
void packed_columns(const PackedLinearProblem& p, const char* w, const float* scales, const float* zeros,
                    const float* x, const float* sums, bool asks, Vec (&total)[MR][NV]) {
  using S = Steps<NV>;
  // Multiply-adds wait for their sums: eight at least go side by side.
  constexpr int kSums = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
  constexpr int64_t kAhead = 4096;
  const int64_t groups = p.groups(), steps = p.padded_group() / kPackedSteps;
  for (auto& row : total)
    for (Vec& t : row) t = Vec::zero();
  for (int64_t g = 0; g < groups; ++g) {
    Vec acc[kSums][MR][NV];
    for (auto& sum : acc)
      for (auto& row : sum)
        for (Vec& a : row) a = Vec::zero();
    for (int64_t k = 0; k < steps; ++k, w += S::kBytes, x += kPackedSteps * MR) {
      if (asks)
        for (int64_t line = 0; line < S::kBytes; line += 64) prefetch(w + kAhead + line);
      S numbers(w);
#pragma GCC unroll 8
      for (int i = 0; i < kPackedSteps; ++i) {
        Vec y[NV];
        numbers.step(w, i, y);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const Vec b = Vec::set1(x[i * MR + m]);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i % kSums][m][j] = fmadd(y[j], b, acc[i % kSums][m][j]);
        }
      }
    }
    for (int j = 0; j < NV; ++j) {
      const Vec scale = Vec::load(scales + g * kPackedPanel + j * Vec::width);
      const Vec zero = zeros ? Vec::load(zeros + g * kPackedPanel + j * Vec::width) : Vec::set1(p.bits == 4 ? 8 : 0);
      for (int m = 0; m < MR; ++m) {
        Vec sum = acc[0][m][j];
        for (int s = 1; s < kSums; ++s) sum = sum + acc[s][m][j];
        if (zeros || p.bits == 4) sum = sum - zero * Vec::set1(sums[g * MR + m]);
        total[m][j] = fmadd(scale, sum, total[m][j]);
      }
    }
  }
}

// f(x) of a call: rows in groups, as packed_columns reads them, and their sums over each group of inputs.
template <class T>
class PackedRows {
 public:
  PackedRows(const PackedLinearProblem& p, Carver& memory)
      : p_(p),
        x_(memory.take<float>((p.linear.rows + kLargest) * p.padded_in())),
        sums_(memory.take<float>((p.linear.rows + kLargest) * p.groups())),
        row_(memory.take<T>(p.linear.in)) {}

  void place() const {
    visit([&](auto mr, int64_t first, float* x, float* sums) {
      for (int m = 0; m < mr(); ++m) place_row<mr()>(std::min(first + m, p_.linear.rows - 1), m, x, sums);
    });
  }

  // f(rows of a group as a constant, its first row, its x, its sums): 8, 4, 2 or 1, where a group may lack its last
  // row.
  template <class F>
  void visit(F&& f) const {
    float *x = x_, *sums = sums_;
    auto call = [&](auto mr, int64_t first) {
      f(mr, first, x, sums);
      x += mr() * p_.padded_in();
      sums += mr() * p_.groups();
      return first + mr();
    };
    for (int64_t first = 0; first < p_.linear.rows;) {
      const int64_t left = p_.linear.rows - first;
      if (left >= 7) {
        first = call(std::integral_constant<int, 8>(), first);
      } else if (left >= 3) {
        first = call(std::integral_constant<int, 4>(), first);
      } else if (left == 2) {
        first = call(std::integral_constant<int, 2>(), first);
      } else {
        first = call(std::integral_constant<int, 1>(), first);
      }
    }
  }

 private:
  static constexpr int kLargest = 8;

  template <int MR>
  void place_row(int64_t row, int m, float* x, float* sums) const {
    const T* const from = prepared_row(p_.linear, row, row_);
    const int64_t padded = p_.padded_group();
    for (int64_t g = 0; g < p_.groups(); ++g) {
      float sum = 0;
      for (int64_t k = 0; k < padded; ++k) {
        const float value = k < p_.group ? static_cast<float>(to_float(from[g * p_.group + k])) : 0.0f;
        sum += value;
        x[(g * padded + k) * MR + m] = p_.bits == 4 ? value * Int4Steps<1>::smaller(k) : value;
      }
      sums[g * MR + m] = sum;
    }
  }

  const PackedLinearProblem& p_;
  float *x_, *sums_;
  T* row_;
};

// A panel of output features for all rows.
template <template <int> class Steps, class T>
void packed_panel(const PackedLinearProblem& p, const PackedRows<T>& rows, int64_t panel) {
  constexpr int kAll = kPackedPanel / Vec::width;
  const int64_t n = panel * kPackedPanel, groups = p.groups() * kPackedPanel;
  const char* const w = p.data + panel * p.panel_bytes();
  const float* const scales = p.scales + panel * groups;
  const float* const zeros = p.zeros ? p.zeros + panel * groups : nullptr;
  rows.visit([&](auto mr, int64_t first, const float* x, const float* sums) {
    constexpr int MR = mr(), kMost = Vec::width == 16 ? 16 : 8, NV = std::min(kAll, std::max(1, kMost / MR));
    for (int v = 0; v < kAll; v += NV) {
      const int at = v * Vec::width;
      Vec y[MR][NV];
      packed_columns<Steps, MR, NV>(p, w + at * Steps<NV>::kColumnBytes, scales + at, zeros ? zeros + at : nullptr, x,
                                    sums, first == 0 && v == 0, y);
      for (int m = 0; m < MR && first + m < p.linear.rows; ++m)
        for (int j = 0; j < NV; ++j) {
          const int64_t feature = n + at + j * Vec::width;
          if (feature < p.linear.out)
            finish_features<T>(p.linear, first + m, feature,
                               static_cast<int>(std::min<int64_t>(Vec::width, p.linear.out - feature)), y[m][j]);
        }
    }
  });
}

template <class T>
void packed_linear_typed(const PackedLinearProblem& p, const Parallel& parallel) {
  Carver measure;
  PackedRows<T>(p, measure);
  const Workspace workspace(measure.used());  // a long prompt's rows do not stay
  Carver memory(workspace.data());
  const PackedRows<T> rows(p, memory);
  rows.place();
  parallel.for_each(p.panels(), linear_worth_threads(p.linear), [&](int64_t panel) {
    if (p.bits == 4) {
      packed_panel<Int4Steps, T>(p, rows, panel);
    } else {
      packed_panel<Int8Steps, T>(p, rows, panel);
    }
  });
}

}  // namespace effops::cpu::EFFOPS_ISA
