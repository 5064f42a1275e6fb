// Products of packed weights with rows that are rounded to int8: integers, a conversion a group.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/gemv/packed.h"

namespace effops::cpu::EFFOPS_ISA {

// A word of numbers as factors: kParts words, against as many of a row. Field i of a word meets the row's input
// input(part, i) of the word's.
struct Int4Dots {
  static constexpr int kWords = 1, kParts = 2, kFields = 4;  // words of kPackedSteps inputs, fields of a part
  static constexpr int input(int part, int field) { return 2 * field + part; }
  static Words part(Words w, int p) { return (p == 0 ? w : w.right(4)) & 0x0f0f0f0f; }
  static Words dot(Words acc, Words a, Words b) { return dot_bytes(acc, a, b); }
};

struct Int8Dots {
  static constexpr bool kWhole = Words::kWholeBytes;
  static constexpr int kWords = 2, kParts = kWhole ? 1 : 2, kFields = kWhole ? 4 : 2;
  static constexpr int input(int part, int field) { return kWhole ? field : 2 * field + part; }
  static Words part(Words w, int p) { return kWhole ? w : (p == 0 ? w : w.right(8)) & 0x00ff00ff; }
  static Words dot(Words acc, Words a, Words b) {
    if constexpr (kWhole) {
      return dot_bytes(acc, a, b);
    } else {
      return dot_halves(acc, a, b);
    }
  }
};

// f(dots of `format`); float8 has none.
template <class F>
void with_dots(PackedFormat format, F&& f) {
  format == PackedFormat::int4 ? f(Int4Dots()) : f(Int8Dots());
}

// Rows of int8 as the dots want them, the steps of each group of inputs and the sums of its numbers.
template <class Dots>
class Int8Rows : public RowGroups {
 public:
  static constexpr int kWordsAStep = Dots::kWords * Dots::kParts;

  // Of room() rows: words() each at x, groups() each at steps and sums.
  Int8Rows(const PackedMatrix& w, int64_t rows, int32_t* x, float* steps, int32_t* sums)
      : RowGroups(rows, false), w_(&w), x_(x), steps_(steps), sums_(sums) {}

  static int64_t words(const PackedMatrix& w) { return w.padded_in() / kPackedSteps * kWordsAStep; }

  template <class F>
  void place(int64_t block, F&& row) const {
    visit_rows(block, row, [&](auto mr, auto* from, int64_t first, int m) { place_row<mr()>(from, first, m); });
  }

  template <class, int MR, int NV>
  void multiply(const char* w, int64_t first, bool asks, Vec (&total)[MR][NV]) const {
    constexpr int64_t kBytes = Dots::kWords * kPackedLine;
    const int32_t* x = x_ + first * words(*w_);
    const float* steps = steps_ + first * w_->groups();
    const int32_t* sums = sums_ + first * w_->groups();
    const int64_t groups = w_->groups(), count = w_->padded_group() / kPackedSteps;
    for (auto& row : total)
      for (Vec& t : row) t = Vec::zero();
    for (int64_t g = 0; g < groups; ++g, w += kPackedLine, steps += MR, sums += MR) {
      Words acc[MR][NV];
      for (auto& row : acc)
        for (Words& a : row) a = Words::set1(0);
      for (int64_t k = 0; k < count; ++k, w += kBytes, x += kWordsAStep * MR) {
        if (asks) ask_ahead(w, kBytes);
#pragma GCC unroll 2
        for (int i = 0; i < Dots::kWords; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            const Words word = Words::load(w + i * kPackedLine + j * Vec::width * kPackedWord);
#pragma GCC unroll 2
            for (int p = 0; p < Dots::kParts; ++p) {
              const Words part = Dots::part(word, p);
#pragma GCC unroll 8
              for (int m = 0; m < MR; ++m)
                acc[m][j] = Dots::dot(acc[m][j], part, Words::set1(x[(i * Dots::kParts + p) * MR + m]));
            }
          }
      }
      if (asks) ask_ahead(w, kPackedLine);
      for (int j = 0; j < NV; ++j) {
        const Words word = Words::load(w + j * Vec::width * kPackedWord);
        const Vec scale = (word & ~kPackedZero).floats();
        for (int m = 0; m < MR; ++m) {
          const Words sum = acc[m][j] - (word & kPackedZero) * Words::set1(sums[m]);
          total[m][j] = fmadd(scale * Vec::set1(steps[m]), sum.numbers(), total[m][j]);
        }
      }
    }
  }

 private:
  template <int MR, class T>
  void place_row(const T* from, int64_t first, int m) const {
    const int64_t group = w_->group;
    int32_t* x = x_ + first * words(*w_) + m;
    for (int64_t g = 0; g < w_->groups(); ++g, from += group) {
      float largest = 0;
      bool finite = true;
      for (int64_t k = 0; k < group; ++k) {
        const float size = std::abs(static_cast<float>(to_float(from[k])));
        finite = finite && std::isfinite(size);
        largest = std::max(largest, size);
      }
      // A group that is not finite makes its row NaN, by a step that is none; its numbers stay out of integers.
      const float step = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
      const float divisor = step > 0 ? step : 1;
      int32_t sum = 0;
      for (int64_t at = 0; at < w_->padded_group(); at += kPackedSteps) {
        int32_t numbers[kPackedSteps] = {};
        for (int64_t k = 0; finite && k < std::min<int64_t>(kPackedSteps, group - at); ++k) {
          const float value = static_cast<float>(to_float(from[at + k])) / divisor;
          numbers[k] = static_cast<int32_t>(std::nearbyint(std::clamp(value, -127.0f, 127.0f)));
          sum += numbers[k];
        }
        for (int i = 0; i < kWordsAStep; ++i, x += MR) {
          uint32_t word = 0;
          for (int f = 0; f < Dots::kFields; ++f) {
            constexpr int kBits = 32 / Dots::kFields;
            const int input = i / Dots::kParts * (kPackedSteps / Dots::kWords) + Dots::input(i % Dots::kParts, f);
            word |= (static_cast<uint32_t>(numbers[input]) & (0xffffffffu >> (32 - kBits))) << (f * kBits);
          }
          *x = static_cast<int32_t>(word);
        }
      }
      steps_[(first * w_->groups()) + g * MR + m] = step;
      sums_[(first * w_->groups()) + g * MR + m] = sum;
    }
  }

  const PackedMatrix* w_;
  int32_t* x_;
  float* steps_;
  int32_t* sums_;
};

}  // namespace effops::cpu::EFFOPS_ISA
