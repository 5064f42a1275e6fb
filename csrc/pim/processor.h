// The processor beside the memory: cycles of weight-stationary systolic arrays and vector units, or a roofline.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pim/device.h"

namespace effops::pim {

// Work of one operator on one device.
struct Work {
  double compute_ns = 0, read_bytes = 0, write_bytes = 0, flops = 0;

  Work& operator+=(const Work& o) {
    compute_ns += o.compute_ns, read_bytes += o.read_bytes, write_bytes += o.write_bytes, flops += o.flops;
    return *this;
  }
};

// `count` products of rows x in times in x out. Arrays keep array_rows x array_columns weights and take the next while
// they compute; a tile lasts max(rows, array_rows) cycles, the first also its loading and the way through the array.
double gemm_ns(const Processor& p, int64_t rows, int64_t in, int64_t out, int64_t count = 1);

enum class VectorOp : uint8_t { layer_norm, softmax, add, activation };
// `rows` vectors of n elements, spread over the units; 0 on a roofline, whose bytes count.
double vector_ns(const Processor& p, VectorOp op, int64_t rows, int64_t n);

// One query row against each of the tiles of a sequence's keys and values, for one KV head.
double attention_head_ns(const Processor& p, int64_t len, int64_t head_dim, int64_t group);

}  // namespace effops::pim
