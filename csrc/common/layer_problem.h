// Element-wise steps of a decoder layer, free of torch. The inner dimension is contiguous except in
// caches.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/views.h"

namespace effops {

struct RmsNormProblem {
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t dim = 0;
  double eps = 1e-6, weight_offset = 0;
  const char *x = nullptr, *weight = nullptr;
  char* y = nullptr;  // contiguous
};

struct Angles {                                // pairs (i, i + half) of the first 2 * half elements turn
  const float *cos = nullptr, *sin = nullptr;  // [positions, half]
  int64_t half = 0, rows = 0;                  // rows: positions there are
  TokenIndices positions;

  // Where in cos and sin a token's row begins.
  EFFOPS_HD int64_t of(int64_t b, int64_t t) const { return positions.of(b, t) * half; }
};

struct RotaryProblem {  // x [batch, tokens, heads, dim]; rows are (batch, token, head)
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t dim = 0;
  Angles angles;
  const char* x = nullptr;
  char* y = nullptr;  // contiguous
};

struct RotaryAppendProblem {  // x [batch, tokens, heads + 2 * kv_heads, dim]: query, key, value heads
  DType dtype = DType::f32;
  int64_t batch = 0, tokens = 0, heads = 0, kv_heads = 0, dim = 0;
  const char* x = nullptr;
  int64_t x_batch = 0, x_token = 0, x_head = 0;
  Angles angles;
  TokenIndices slots;  // negative: not written
  char* q = nullptr;   // [batch, tokens, heads, dim], contiguous
  TensorView4 k, v;    // caches [batch, slots, kv_heads, dim], or pages of them
  PageTable pages;
  CacheLimits limits;
};

struct SiluMulProblem {
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t dim = 0;  // of the output: x rows hold 2 * dim
  const char* x = nullptr;
  char* y = nullptr;  // contiguous
};

struct AddProblem {  // y += x, both contiguous
  DType dtype = DType::f32;
  int64_t count = 0;
  const char* x = nullptr;
  char* y = nullptr;
};

// outs [parts, rows, dim] and lses [parts, rows], all contiguous; out may be narrower where outs are float32.
struct MergeProblem {
  DType dtype = DType::f32, out_dtype = DType::f32;  // of outs, of out
  int64_t parts = 0, rows = 0, dim = 0;
  const char *outs = nullptr, *lses = nullptr;
  char *out = nullptr, *lse = nullptr;
};

inline constexpr int64_t kLayerSerial = 1 << 14;  // elements below which threads cost more than they give

}  // namespace effops
