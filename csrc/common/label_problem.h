// Labels: a few channels of every key, as numbers or in few bits, by which the tokens that a query is likeliest to
// attend to are found without reading the keys (Double Sparsity, arXiv 2408.07092).
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/selection_range.h"
#include "common/views.h"

namespace effops {

// How labels lie in memory. Those of few bits are 32-bit words: channel i is bits [bits * i, bits * (i + 1)) of word
// i / (32 / bits), counted from the least significant, and stands for that unsigned number less half its range.
struct LabelFormat {
  DType dtype = DType::f32;  // where bits is 0
  int bits = 0;              // 0, 4 or 8
  int64_t channels = 0;      // of a KV head

  EFFOPS_HD int64_t items() const { return bits == 0 ? channels : (channels * bits + 31) / 32; }  // of a token's head
  EFFOPS_HD int middle() const { return 1 << (bits - 1); }
};

struct LabelAppendProblem {
  LabelFormat format;
  DType dtype = DType::f32;  // of keys
  int64_t batch = 0, tokens = 0, heads = 0;
  int64_t capacity = 0;            // slots of a sequence
  TensorView4 keys, labels;        // [batch, tokens, heads, D], [batch, capacity, heads, items]
  Strided<int32_t> channels;       // [heads, channels], in [0, D)
  int64_t dim = 0;                 // D
  Strided<float> scales, offsets;  // [heads, channels]; null: 1, 0
  TokenIndices slots;              // negative skips
};

// The number that a channel of a key becomes, as it is stored.
EFFOPS_HD inline float label_number(float key, float offset) { return key - offset; }
EFFOPS_HD inline uint32_t label_bits(float key, float scale, float offset, int bits) {
  const float middle = static_cast<float>(1 << (bits - 1)), x = rintf((key - offset) / scale);
  if (!(x > -middle)) return x == x ? 0 : 1u << (bits - 1);  // NaN is the middle
  return static_cast<uint32_t>(static_cast<int>(x < middle - 1 ? x : middle - 1) + static_cast<int>(middle));
}

struct LabelSearchProblem {
  LabelFormat format;
  DType dtype = DType::f32;  // of q
  int64_t batch = 0, heads = 0, kv_heads = 0, capacity = 0, dim = 0;
  bool each_head = false;                                  // a list for each query head, otherwise for each KV head
  TensorView4 q, labels;                                   // [batch, 1, heads, D], [batch, capacity, kv_heads, items]
  Strided<int32_t> channels;                               // [kv_heads, channels], in [0, D)
  Strided<float> scales;                                   // [kv_heads, channels]; null: 1
  const int32_t *kv_lens = nullptr, *kv_starts = nullptr;  // [batch]
  int64_t num_sinks = 0, window = 0;                       // taken whatever their scores: at most count
  int64_t count = 0;
  int32_t* indices = nullptr;  // [batch, lists, count]: ascending, then -1

  EFFOPS_HD int64_t group() const { return heads / kv_heads; }
  EFFOPS_HD int64_t lists() const { return each_head ? heads : kv_heads; }
  EFFOPS_HD int64_t rows() const { return each_head ? 1 : group(); }  // query heads of a list
};

EFFOPS_HD inline SelectionRange range_of(const LabelSearchProblem& p, int64_t b) {
  const int64_t end = p.kv_lens ? clamp_to<int64_t>(p.kv_lens[b], 0, p.capacity) : p.capacity;
  const int64_t start = p.kv_starts ? clamp_to<int64_t>(p.kv_starts[b], 0, end) : 0;
  return SelectionRange::of(start, end, p.num_sinks, end - p.window, p.count);
}

// Beside labels of few bits the query has eight: the same step for all heads of a list, so that scores are integers.
EFFOPS_HD inline float query_step(float largest) { return largest / 127; }
EFFOPS_HD inline int query_byte(float x, float step) {
  if (!(step > 0)) return 0;
  const float y = rintf(x / step);
  return y >= -127 && y <= 127 ? static_cast<int>(y) : 0;
}

}  // namespace effops
