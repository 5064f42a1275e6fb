// Filtered laws of next tokens and draws from them, free of torch.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/views.h"

namespace effops {

enum class RowFlaw : int64_t { none, nan, infinite, empty };  // empty: every logit is -inf

// The first row that has no law, whichever thread comes upon it first.
struct FlawedRow {
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first{kNone};  // row * 4 + flaw

  void report(int64_t row, RowFlaw flaw) {
    const int64_t mine = row * 4 + static_cast<int64_t>(flaw);
    for (int64_t seen = first; mine < seen && !first.compare_exchange_weak(seen, mine);) {
    }
  }
  bool any() const { return first != kNone; }
  int64_t row() const { return first / 4; }
  RowFlaw flaw() const { return static_cast<RowFlaw>(first % 4); }
};

// Rows of `size` >= 1 logits: the `best` likeliest tokens of each where that is given, a draw where tokens is, else
// the law.
struct SamplingProblem {
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t size = 0;
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;  // 0: all
  const char* x = nullptr;
  const double* uniforms = nullptr;  // [rows], in [0, 1); not read at temperature 0
  int64_t best = 0;                  // at most size
  int64_t* tokens = nullptr;         // [rows], or [rows, best]
  char* probs = nullptr;             // [rows, size], float32 (float64 for float64)
  FlawedRow* flawed = nullptr;
};

}  // namespace effops
