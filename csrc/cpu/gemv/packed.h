// Products of rows with a matrix in few bits: one pass over its bytes. Floor: those bytes at read bandwidth for few
// rows, multiplications for many. A number costs three operations: a mask, a conversion and the multiply-add;
// its step and zero cost a few a group.
#pragma once

#include "common/packed_problem.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemv/linear_rows.h"
#include "cpu/simd/words.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int64_t kPackedLine = kPackedPanel * kPackedWord;  // bytes of one word of each row of a panel

// Bytes that a panel takes, and where `panel` begins.
inline int64_t packed_panel_bytes(const PackedMatrix& w) { return w.row_words() * kPackedLine; }
inline const char* packed_panel(const PackedMatrix& w, int64_t panel) { return w.data + panel * packed_panel_bytes(w); }

// The numbers of kPackedSteps inputs of a vector of features, one input after the other. Fields of a word are not
// shifted to its low end where they stay below 2^31: what a number is too large by, the query is made smaller by.
struct Int4Steps {
  static constexpr int kLines = 1;
  static constexpr bool kZeros = true;
  static float smaller(int64_t k) { return 1.0f / static_cast<float>(1 << (k % 4 * 4)); }

  Words words;
  Vec step(const char* at, int i) {
    if (i == 0) words = Words::load(at);
    if (i == 4) words = words.right(16);
    return (words & 15u << (i % 4 * 4)).numbers();
  }
};

struct Int8Steps {
  static constexpr int kLines = 2;
  static constexpr bool kZeros = true;
  static float smaller(int64_t k) { return k % 4 == 3 ? 1.0f : 1.0f / static_cast<float>(1 << (k % 4 * 8)); }

  Words words;
  Vec step(const char* at, int i) {
    if (i % 4 == 0) words = Words::load(at + i / 4 * kPackedLine);
    return (i % 4 == 3 ? words.right(24) : words & 255u << (i % 4 * 8)).numbers();
  }
};

struct Fp8Steps {
  static constexpr int kLines = 2;
  static constexpr bool kZeros = false;
  static float smaller(int64_t) { return 1; }

  Words words;
  Vec step(const char* at, int i) {
    if (i % 4 == 0) words = Words::load(at + i / 4 * kPackedLine);
    return e4m3_of(words, i % 4);
  }
};

// f(steps of `format`).
template <class F>
void with_steps(PackedFormat format, F&& f) {
  switch (format) {
    case PackedFormat::int4:
      return f(Int4Steps());
    case PackedFormat::int8:
      return f(Int8Steps());
    case PackedFormat::fp8_e4m3:
      return f(Fp8Steps());
  }
}

// Asks for what lies kAhead bytes behind `bytes` at w: all of a matrix, once.
inline void ask_ahead(const char* w, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  for (int64_t line = 0; line < bytes; line += 64) prefetch(w + kAhead + line);
}

// Multiply-adds wait for their sums: eight at least go side by side.
constexpr int parts_of_sums(int sums) { return sums >= 8 ? 1 : sums >= 4 ? 2 : 4; }

// Adds a group to `total`: at `w` the words of its steps and zeros, `sums` of its inputs, and `acc` parts of the sums
// of its products.
template <bool kZeros, int kSums, int MR, int NV>
void add_group(const char* w, const float* sums, const Vec (&acc)[kSums][MR][NV], Vec (&total)[MR][NV]) {
  for (int j = 0; j < NV; ++j) {
    const Words word = Words::load(w + j * Vec::width * kPackedWord);
    const Vec scale = (word & ~kPackedZero).floats(), zero = (word & kPackedZero).numbers();
    for (int m = 0; m < MR; ++m) {
      Vec sum = acc[0][m][j];
      for (int s = 1; s < kSums; ++s) sum = sum + acc[s][m][j];
      if (kZeros) sum = sum - zero * Vec::set1(sums[m]);
      total[m][j] = fmadd(scale, sum, total[m][j]);
    }
  }
}

// MR rows against NV vectors of a panel's features, which begin at `w`; `x` is [inputs][MR], `sums` are those of each
// group's inputs.
template <class Steps, int MR, int NV>
void packed_columns(const PackedMatrix& p, const char* w, const float* x, const float* sums, bool asks,
                    Vec (&total)[MR][NV]) {
  constexpr int kSums = parts_of_sums(MR * NV);
  constexpr int64_t kBytes = Steps::kLines * kPackedLine;
  const int64_t groups = p.groups(), steps = p.padded_group() / kPackedSteps;
  for (auto& row : total)
    for (Vec& t : row) t = Vec::zero();
  for (int64_t g = 0; g < groups; ++g, w += kPackedLine, sums += MR) {
    Vec acc[kSums][MR][NV];
    for (auto& sum : acc)
      for (auto& row : sum)
        for (Vec& a : row) a = Vec::zero();
    for (int64_t k = 0; k < steps; ++k, w += kBytes, x += kPackedSteps * MR) {
      if (asks) ask_ahead(w, kBytes);
      Steps numbers[NV];
      // One row: two vectors at a time, so that registers hold the sums.
      constexpr int kTogether = MR == 1 ? std::min(2, NV) : NV;
#pragma GCC unroll 4
      for (int first = 0; first < NV; first += kTogether) {
#pragma GCC unroll 8
        for (int i = 0; i < kPackedSteps; ++i) {
          Vec y[kTogether];
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j)
            y[j] = numbers[first + j].step(w + (first + j) * Vec::width * kPackedWord, i);
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) {
            if constexpr (MR == 1) asm volatile("" ::: "memory");  // x is read again: kept, it would take their place
            const Vec b = Vec::set1(x[i * MR + m]);
#pragma GCC unroll 4
            for (int j = 0; j < kTogether; ++j) {
              Vec& sum = acc[i % kSums][m][first + j];
              sum = fmadd(y[j], b, sum);
            }
          }
        }
      }
    }
    if (asks) ask_ahead(w, kPackedLine);
    add_group<Steps::kZeros>(w, sums, acc, total);
  }
}

// Rows in groups of 8, 4, 2 or 1 that go through a panel together; `even`: all of 8, so that every row goes through the
// same loop.
class RowGroups {
 public:
  static constexpr int kBlock = 8;

  RowGroups(int64_t rows, bool even) : rows_(rows), even_(even) {}

  // Places of rows: groups may lack rows.
  static int64_t room(int64_t rows, bool even) { return even ? (rows + kBlock - 1) / kBlock * kBlock : rows + 1; }

  int64_t rows() const { return rows_; }
  int64_t blocks() const { return (rows_ + kBlock - 1) / kBlock; }

  // f(rows of a group as a constant, its first row) for the groups of a block; the last may lack rows.
  template <class F>
  void visit(int64_t block, F&& f) const {
    const int64_t end = std::min(rows_, (block + 1) * kBlock);
    for (int64_t first = block * kBlock; first < end;) {
      const int64_t left = end - first;
      auto call = [&](auto mr) {
        f(mr, first);
        first += mr();
      };
      if (left >= 7 || even_) {
        call(std::integral_constant<int, 8>());
      } else if (left >= 3) {
        call(std::integral_constant<int, 4>());
      } else if (left == 2) {
        call(std::integral_constant<int, 2>());
      } else {
        call(std::integral_constant<int, 1>());
      }
    }
  }

  // f(rows of its group as a constant, row(i), the group's first row, its place there) for the rows of a block; rows
  // that the last group lacks are the last one again.
  template <class Row, class F>
  void visit_rows(int64_t block, Row&& row, F&& f) const {
    visit(block, [&](auto mr, int64_t first) {
      for (int m = 0; m < mr(); ++m) f(mr, row(std::min(first + m, rows_ - 1)), first, m);
    });
  }

 private:
  int64_t rows_;
  bool even_;
};

// Rows of float32 as packed_columns reads them, and their sums over each group of inputs.
class PackedRows : public RowGroups {
 public:
  using Input = float;
  static int64_t inputs(const PackedMatrix& w) { return w.padded_in(); }

  // Of room() rows: inputs() each at x, groups() each at sums.
  PackedRows(const PackedMatrix& w, int64_t rows, bool even, float* x, float* sums)
      : RowGroups(rows, even), w_(&w), x_(x), sums_(sums) {}

  // Rows of a block: row(i) is the i-th, valid until the next call.
  template <class F>
  void place(int64_t block, F&& row) const {
    visit_rows(block, row, [&](auto mr, auto* from, int64_t first, int m) { place_row<mr()>(from, first, m); });
  }

  // The products of a group from `first` on with NV vectors of features at `data`.
  template <class Steps, int MR, int NV>
  void multiply(const char* data, int64_t first, bool asks, Vec (&y)[MR][NV]) const {
    packed_columns<Steps, MR, NV>(*w_, data, x_ + first * w_->padded_in(), sums_ + first * w_->groups(), asks, y);
  }

 private:
  template <int MR, class T>
  void place_row(const T* from, int64_t first, int m) const {
    float *const x = x_ + first * w_->padded_in(), *const sums = sums_ + first * w_->groups();
    const int64_t padded = w_->padded_group(), group = w_->group;
    float smaller[Vec::width];
    with_steps(w_->format, [&](auto steps) {
      for (int k = 0; k < Vec::width; ++k) smaller[k] = steps.smaller(k);
    });
    for (int64_t g = 0; g < w_->groups(); ++g) {
      Vec sum = Vec::zero();
      for (int64_t k = 0; k < padded; k += Vec::width) {
        const int some = static_cast<int>(std::clamp<int64_t>(group - k, 0, Vec::width));
        const Vec value = load_some<Vec>(from + g * group + k, some);
        const int places = static_cast<int>(std::min<int64_t>(Vec::width, padded - k));
        float* const to = x + (g * padded + k) * MR + m;
        const Vec scaled = value * Vec::load(smaller);
        sum = sum + value;
        if constexpr (MR == 1) {
          store_n(scaled, to, places);
        } else {
          float each[Vec::width];
          scaled.store(each);
          for (int i = 0; i < places; ++i) to[i * MR] = each[i];
        }
      }
      sums[g * MR + m] = reduce_add(sum);
    }
  }

  const PackedMatrix* w_;
  float *x_, *sums_;
};

// A panel at its full width: the last one of a matrix may be narrower, and becomes a copy with zeros.
inline const char* whole_panel(const PackedMatrix& w, int64_t panel) {
  const char* const data = packed_panel(w, panel);
  const int64_t width = w.out - panel * kPackedPanel;
  if (width >= kPackedPanel) return data;
  char* const wide = static_cast<char*>(thread_scratch(Scratch::task, packed_panel_bytes(w)));
  std::memset(wide, 0, packed_panel_bytes(w));
  for (int64_t i = 0; i < w.row_words(); ++i)
    std::memcpy(wide + i * kPackedLine, data + i * width * kPackedWord, width * kPackedWord);
  return wide;
}

// All rows against a panel: f(first row, rows, products [rows][kPackedPanel]) until all have been served.
template <class Steps, class Rows, class F>
void packed_product(const PackedMatrix& w, const Rows& rows, int64_t panel, F&& f) {
  constexpr int kAll = kPackedPanel / Vec::width;
  const char* const data = whole_panel(w, panel);
  for (int64_t block = 0; block < rows.blocks(); ++block)
    rows.visit(block, [&](auto mr, int64_t first) {
      constexpr int MR = mr(), kMost = Vec::width == 16 ? 16 : 8, NV = std::min(kAll, std::max(1, kMost / MR));
      alignas(64) float c[MR * kPackedPanel];
      for (int v = 0; v < kAll; v += NV) {
        Vec y[MR][NV];
        rows.template multiply<Steps>(data + v * Vec::width * kPackedWord, first, first == 0 && v == 0, y);
        for (int m = 0; m < MR; ++m)
          for (int j = 0; j < NV; ++j) y[m][j].store(c + m * kPackedPanel + (v + j) * Vec::width);
      }
      f(first, std::min<int64_t>(MR, rows.rows() - first), c);
    });
}

}  // namespace effops::cpu::EFFOPS_ISA
