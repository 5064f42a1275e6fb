// Scores of a list's tokens by their labels, as keys whose order is theirs: sixteen bits that are compared many at a
// time, and where those do not tell all, thirty-two.
#pragma once

#include <algorithm>
#include <bit>

#include "common/label_problem.h"
#include "cpu/simd/nibbles.h"
#include "cpu/simd/simd.h"

namespace effops::cpu::EFFOPS_ISA {

inline constexpr int kKeyTokens = 512;  // of a step: what is copied for it stays in the first-level cache

// The labels of a list's KV head, item by item: in place where neighbouring tokens are neighbours in memory.
template <class T>
class LabelPlanes {
 public:
  LabelPlanes(const LabelSearchProblem& p, int64_t b, int64_t g)
      : base_(reinterpret_cast<const T*>(p.labels.data) + b * p.labels.batch + g * p.labels.head), view_(p.labels) {}

  // Of tokens [j, j + n), readable up to a whole number of vectors. `stage` holds kKeyTokens.
  const T* plane(int64_t item, int64_t j, int64_t n, T* stage) const {
    const T* const from = base_ + j * view_.token + item * view_.dim;
    if (view_.token == 1 && n % kNibbleTokens == 0) return from;
    copy_row(from, view_.token, n, stage);
    std::fill(stage + n, stage + (n + kNibbleTokens - 1) / kNibbleTokens * kNibbleTokens, T{});
    return stage;
  }

 private:
  const T* base_;
  TensorView4 view_;
};

inline float query_channel(const LabelSearchProblem& p, int64_t b, int64_t h, int64_t c) {
  const int64_t g = h / p.group(), channel = p.channels.at(g, c);
  const int64_t at = b * p.q.batch + h * p.q.head + channel * p.q.dim;
  float x = 0;
  switch (p.dtype) {
    case DType::f32:
      x = reinterpret_cast<const float*>(p.q.data)[at];
      break;
    case DType::bf16:
      x = to_float(reinterpret_cast<const bf16*>(p.q.data)[at]);
      break;
    case DType::f16:
      x = to_float(reinterpret_cast<const f16*>(p.q.data)[at]);
      break;
    case DType::f64:
      x = static_cast<float>(reinterpret_cast<const double*>(p.q.data)[at]);
  }
  return p.scales.data ? x * p.scales.at(g, c) : x;
}

// The query heads of a list as bytes, for the low and the high nibbles of each word.
struct QueryBytes {
  struct Word {
    int32_t low, high;
  };
  Word* words;    // [rows, items]
  int32_t* less;  // [rows]: what the labels' being unsigned adds

  // `x` holds the channels of a row.
  QueryBytes(const LabelSearchProblem& p, int64_t b, int64_t h, Carver& memory, float* x)
      : words(memory.take<Word>(p.rows() * p.format.items())), less(memory.take<int32_t>(p.rows())) {
    if (x == nullptr) return;  // measuring
    const int64_t channels = p.format.channels, items = p.format.items();
    float largest = 0;
    for (int64_t i = 0; i < p.rows() * channels; ++i) {
      x[i] = query_channel(p, b, h + i / channels, i % channels);
      largest = std::max(largest, std::abs(x[i]));
    }
    const float step = query_step(largest);
    for (int64_t r = 0; r < p.rows(); ++r) {
      Word* const to = words + r * items;
      std::fill(to, to + items, Word{0, 0});
      less[r] = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int q = query_byte(x[r * channels + c], step);
        less[r] += q * p.format.middle();
        if (p.format.bits == 4) {
          int32_t& word = c % 2 == 0 ? to[c / 8].low : to[c / 8].high;
          word |= static_cast<int32_t>(static_cast<uint32_t>(q & 255) << (c % 8 / 2 * 8));
        } else {
          to[c / 4].low |= static_cast<int32_t>(static_cast<uint32_t>(q & 255) << (c % 4 * 8));
          to[c / 4].high = to[c / 4].low;
        }
      }
    }
  }
};

// One word a token, four bits a channel: the sums have sixteen bits.
inline bool keys_are_short(const LabelFormat& f) { return f.bits == 4 && f.items() == 1; }

// What the keys of sixteen bits leave out of those of thirty-two.
inline int short_key_shift(const LabelFormat& f) {
  if (f.bits == 0) return 16;
  return std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(f.channels * f.middle() * 127))) - 15);
}

template <int R>
void short_sums(const int32_t* words, int64_t n, const QueryBytes& q, int64_t row, int16_t* keys) {
  auto query = [&](int64_t r) {
    return Sums16::Query{q.words[r].low, q.words[r].high, static_cast<int16_t>(q.less[r])};
  };
  const Sums16::Query queries[4] = {query(row), query(row + (R > 1)), query(row + R / 2), query(row + R - 1)};
  for (int64_t j = 0; j < n; j += kNibbleTokens) {
    const NibblePairs x(words + j);
    auto best = Sums16::of(x, queries[0]);
#pragma GCC unroll 4
    for (int r = 1; r < R; ++r) best = max_of_sums(best, Sums16::of(x, queries[r]));
    if (row > 0) best = max_of_sums(best, Sums16::load(keys + j));
    best.store(keys + j);
  }
}

inline void short_keys(const int32_t* words, int64_t n, const QueryBytes& q, int64_t rows, int16_t* keys) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) short_sums<4>(words, n, q, r, keys);
  for (; r + 2 <= rows; r += 2) short_sums<2>(words, n, q, r, keys);
  for (; r < rows; ++r) short_sums<1>(words, n, q, r, keys);
}

// planes(item): the words of n tokens.
template <int kHigh, class Planes>
void word_keys(int64_t n, int64_t items, const QueryBytes& q, int64_t rows, int32_t* sums, int32_t* keys,
               Planes planes) {
  if (items == 0) std::fill(keys, keys + n, 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t item = 0; item < items; ++item) {
      const int32_t* const words = planes(item);
      const QueryBytes::Word w = q.words[r * items + item];
      for (int64_t j = 0; j < n; j += kNibbleTokens) {
        auto sum = item == 0 ? Sums32::all(-q.less[r]) : Sums32::load(sums + j);
        sum.template add<kHigh>(Nibbles(words + j), w.low, w.high);
        if (item == items - 1 && r > 0) sum = max_of_sums(sum, Sums32::load(keys + j));
        sum.store((item == items - 1 ? keys : sums) + j);
      }
    }
  }
}

// Labels that are numbers: dot products in float32. `x`: [rows, channels].
template <class T, class Planes>
void number_keys(int64_t n, int64_t channels, const float* x, int64_t rows, float* sums, int32_t* keys, Planes planes) {
  constexpr int W = Vec::width;
  auto* const best = reinterpret_cast<float*>(keys);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(sums, sums + kKeyTokens, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      const T* const plane = planes(c);
      const Vec w = Vec::set1(x[r * channels + c]);
      for (int64_t j = 0; j < n; j += W) fmadd(Vec::load(plane + j), w, Vec::load(sums + j)).store(sums + j);
    }
    for (int64_t j = 0; j < n; j += W) {
      const Vec sum = Vec::load(sums + j);
      (r == 0 ? sum : max(sum, Vec::load(best + j))).store(best + j);
    }
  }
  for (int64_t j = 0; j < n; ++j) keys[j] = order_key(static_cast<int32_t>(float_to_bits(best[j] + 0.0f)));
}

}  // namespace effops::cpu::EFFOPS_ISA
