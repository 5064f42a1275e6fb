// Element-wise steps of a decoder layer, free of torch. Rows are numbered through up to three outer
// dimensions; strides are in elements and the inner dimension is contiguous.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace effops {

struct RowSpace {  // row index -> element offset
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};

  int64_t rows() const { return size[0] * size[1] * size[2]; }
  int64_t offset(int64_t row) const {
    const int64_t c = row % size[2], ab = row / size[2];
    return ab / size[1] * stride[0] + ab % size[1] * stride[1] + c * stride[2];
  }
};

struct RmsNormProblem {
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t dim = 0;
  double eps = 1e-6, weight_offset = 0;
  const char *x = nullptr, *weight = nullptr;
  char* y = nullptr;  // contiguous
};

struct RotaryProblem {  // x [batch, tokens, heads, dim]; rows are (batch, token, head)
  DType dtype = DType::f32;
  RowSpace rows;
  int64_t dim = 0, half = 0;  // pairs (i, i + half) of the first 2 * half elements turn
  const char* x = nullptr;
  char* y = nullptr;                           // contiguous
  const float *cos = nullptr, *sin = nullptr;  // [positions, half]
  const int32_t* positions = nullptr;          // [batch, tokens]
  int64_t positions_batch = 0, positions_token = 0;
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

struct MergeProblem {  // outs [parts, rows, dim] and lses [parts, rows], all contiguous
  DType dtype = DType::f32;
  int64_t parts = 0, rows = 0, dim = 0;
  const char *outs = nullptr, *lses = nullptr;
  char *out = nullptr, *lse = nullptr;
};

inline constexpr int64_t kLayerSerial = 1 << 14;  // elements below which threads cost more than they give

}  // namespace effops
