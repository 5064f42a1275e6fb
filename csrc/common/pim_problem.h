// Matrices times vectors as units at memory banks compute them: in their order and their precision.
#pragma once

#include "common/dtype.h"
#include "common/host_device.h"

namespace effops {

// The matrix [out, in] lies in rows of banks: row n of it in bank n % units of tile n / units, its values in chunks of
// `row_values`. A unit adds `lanes` products by a tree of neighbours, such sums one after the other, and gives the
// result of every `sum_values` values back, rounded to the element type where `narrow`.
struct PimGemvProblem {
  static constexpr int64_t kMostLanes = 64;

  DType dtype = DType::f32;
  int64_t batch = 0, rows = 0, in = 0, out = 0;
  int64_t tiles = 0, chunks = 0, units = 0, row_values = 0;
  int64_t sum_values = 0, sums = 0, lanes = 0;
  int64_t channels = 1;  // tile t is in channel t % channels
  bool narrow = false;
  const char* x = nullptr;  // [batch, rows, in]
  int64_t x_batch = 0, x_row = 0, x_value = 0;
  const char* banks = nullptr;  // [batch, tiles, chunks, units, row_values]
  int64_t bank_batch = 0, bank_tile = 0, bank_chunk = 0, bank_unit = 0, bank_value = 0;
  const int32_t* out_lens = nullptr;  // [batch]: rows of the matrix that are there; others give 0
  const int32_t* in_lens = nullptr;   // [batch]: values of them
  char* results = nullptr;            // [batch, rows, out, sums] in the compute type

  EFFOPS_HD int64_t out_len(int64_t b) const { return out_lens ? clamp_to<int64_t>(out_lens[b], 0, out) : out; }
  EFFOPS_HD int64_t in_len(int64_t b) const { return in_lens ? clamp_to<int64_t>(in_lens[b], 0, in) : in; }
  // Where value k of a row of the matrix lies, from its bank's first row.
  EFFOPS_HD int64_t value_at(int64_t k) const { return k / row_values * bank_chunk + k % row_values * bank_value; }
  EFFOPS_HD int64_t row_at(int64_t b, int64_t n) const {
    return b * bank_batch + n / units * bank_tile + n % units * bank_unit;
  }
};

}  // namespace effops
