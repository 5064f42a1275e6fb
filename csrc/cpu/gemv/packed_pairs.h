// Products of packed weights with rows of bfloat16, two an operation: numbers of few bits are bfloat16 values.
#pragma once

#include "cpu/gemv/packed.h"

namespace effops::cpu::EFFOPS_ISA {

// A word of numbers as kPairs factors: pair p holds the word's inputs low(p) and high(p). W: Words where these have
// kPairs. A table turns four bits into a number, which costs a shift and a look-up for two.
template <class W>
struct Int4PairDots {
  static constexpr int kWords = 1, kPairs = 4;  // words of kPackedSteps inputs
  static constexpr int low(int p) { return p; }
  static constexpr int high(int p) { return p + 4; }
  static Vec dot(Vec acc, W a, W b) { return dot_pairs(acc, a, b); }
  static W pair(W w, int p) { return (p == 0 ? w : w.right(4 * p)).small_numbers(); }
};

// A float32 of eight bits is a bfloat16 and sixteen zeros.
template <class W>
struct Int8PairDots {
  static constexpr int kWords = 2, kPairs = 2;
  static constexpr int low(int p) { return 2 * p; }
  static constexpr int high(int p) { return 2 * p + 1; }
  static Vec dot(Vec acc, W a, W b) { return dot_pairs(acc, a, b); }
  static W pair(W w, int p) {
    const W first = (p == 0 ? w : w.right(16)) & 255, second = p == 0 ? w.right(8) & 255 : w.right(24);
    return W::of(first.numbers()).right(16) | W::of(second.numbers());
  }
};

// Is this the fastest form? A number of int8 alone costs as much in a pair as by itself.
inline bool in_pairs(PackedFormat format, int64_t rows, bool even) {
  return format == PackedFormat::int4 || (format == PackedFormat::int8 && (rows > 2 || even));
}

// f(pairs of `format`).
template <class F>
void with_pairs(PackedFormat format, F&& f) {
  format == PackedFormat::int4 ? f(Int4PairDots<Words>()) : f(Int8PairDots<Words>());
}

// Rows of pairs as the dots want them, and the sums of each group of inputs.
template <class Pairs>
class PairRows : public RowGroups {
  static constexpr int kEach = Pairs::kWords * Pairs::kPairs;  // pairs of kPackedSteps inputs

 public:
  using Input = uint32_t;
  static int64_t inputs(const PackedMatrix& w) { return w.padded_in() / kPackedSteps * kEach; }

  // Of room() rows: inputs() each at x, groups() each at sums.
  PairRows(const PackedMatrix& w, int64_t rows, bool even, uint32_t* x, float* sums)
      : RowGroups(rows, even), w_(&w), x_(x), sums_(sums) {}

  template <class F>
  void place(int64_t block, F&& row) const {
    visit_rows(block, row, [&](auto mr, auto* from, int64_t first, int m) { place_row<mr()>(from, first, m); });
  }

  template <class, int MR, int NV>
  void multiply(const char* w, int64_t first, bool asks, Vec (&total)[MR][NV]) const {
    // The walk over groups is packed_columns': shared, with the step as a function, two rows of int4 took 1.05 to 1.12
    // times as long.
    constexpr int kSums = parts_of_sums(MR * NV);
    constexpr int64_t kBytes = Pairs::kWords * kPackedLine;
    const uint32_t* x = x_ + first * inputs(*w_);
    const float* sums = sums_ + first * w_->groups();
    const int64_t groups = w_->groups(), steps = w_->padded_group() / kPackedSteps;
    for (auto& row : total)
      for (Vec& t : row) t = Vec::zero();
    for (int64_t g = 0; g < groups; ++g, w += kPackedLine, sums += MR) {
      Vec acc[kSums][MR][NV];
      for (auto& sum : acc)
        for (auto& row : sum)
          for (Vec& a : row) a = Vec::zero();
      for (int64_t k = 0; k < steps; ++k, w += kBytes, x += kEach * MR) {
        if (asks) ask_ahead(w, kBytes);
#pragma GCC unroll 2
        for (int i = 0; i < Pairs::kWords; ++i)
#pragma GCC unroll 4
          for (int p = 0; p < Pairs::kPairs; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
              const Words y = Pairs::pair(Words::load(w + i * kPackedLine + j * Vec::width * kPackedWord), p);
#pragma GCC unroll 8
              for (int m = 0; m < MR; ++m) {
                Vec& sum = acc[p % kSums][m][j];
                sum = Pairs::dot(sum, y, Words::set1(static_cast<int32_t>(x[(i * Pairs::kPairs + p) * MR + m])));
              }
            }
      }
      if (asks) ask_ahead(w, kPackedLine);
      add_group<true>(w, sums, acc, total);
    }
  }

 private:
  template <int MR>
  void place_row(const bf16* from, int64_t first, int m) const {
    uint32_t* x = x_ + first * inputs(*w_) + m;
    const int64_t group = w_->group;
    for (int64_t g = 0; g < w_->groups(); ++g, from += group) {
      float sum = 0;
      for (int64_t at = 0; at < w_->padded_group(); at += kPackedSteps) {
        bf16 inputs[kPackedSteps] = {};
        for (int64_t k = 0; k < std::min<int64_t>(kPackedSteps, group - at); ++k) {
          inputs[k] = from[at + k];
          sum += to_float(inputs[k]);
        }
        for (int i = 0; i < kEach; ++i, x += MR) {
          const bf16* const word = inputs + i / Pairs::kPairs * (kPackedSteps / Pairs::kWords);
          const int p = i % Pairs::kPairs;
          *x = word[Pairs::low(p)].bits | static_cast<uint32_t>(word[Pairs::high(p)].bits) << 16;
        }
      }
      sums_[first * w_->groups() + g * MR + m] = sum;
    }
  }

  const PackedMatrix* w_;
  uint32_t* x_;
  float* sums_;
};

}  // namespace effops::cpu::EFFOPS_ISA
