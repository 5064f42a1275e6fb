#include "pim/processor.h"

namespace effops::pim {
namespace {

int64_t tree(int64_t n, int64_t width) {
  int64_t steps = 1;
  while (n > width) {
    n = ceil_div(n, width);
    steps += n;
  }
  return steps;
}

double tile_cycles(const Processor& p, int64_t rows) { return double(std::max({rows, p.array_rows, int64_t{4}})); }

}  // namespace

double gemm_ns(const Processor& p, int64_t rows, int64_t in, int64_t out, int64_t count) {
  if (rows <= 0 || in <= 0 || out <= 0) return 0;
  if (p.kind == ProcessorKind::roofline)
    return 2.0 * double(count) * double(rows) * double(in) * double(out) / (p.peak_tflops * 1e3);
  const int64_t tiles = count * ceil_div(in, p.array_rows) * ceil_div(out, p.array_columns);
  const double fill = double(3 * p.array_rows - 1 + p.array_columns - 2);
  return (double(ceil_div(tiles, p.arrays)) * tile_cycles(p, rows) + fill) / p.clock_ghz;
}

double vector_ns(const Processor& p, VectorOp op, int64_t rows, int64_t n) {
  if (p.kind == ProcessorKind::roofline || rows <= 0 || n <= 0) return 0;
  const int64_t passes = ceil_div(n, p.vector_width), sums = tree(n, p.vector_width);
  int64_t cycles = passes;
  if (op == VectorOp::softmax) cycles = 2 * sums + 3 * passes;
  if (op == VectorOp::layer_norm) cycles = 2 * sums + 3 + 5 * passes;
  return double(ceil_div(rows, p.vector_units) * cycles) / p.clock_ghz;
}

double attention_head_ns(const Processor& p, int64_t len, int64_t head_dim, int64_t group) {
  if (len <= 0) return 0;
  if (p.kind == ProcessorKind::roofline)
    return 4.0 * double(group) * double(len) * double(head_dim) / (p.peak_tflops * 1e3);
  const int64_t tiles = ceil_div(head_dim, p.array_rows) * ceil_div(len, p.array_columns) +
                        ceil_div(len, p.array_rows) * ceil_div(head_dim, p.array_columns);
  return double(tiles) * tile_cycles(p, group) / double(p.arrays) / p.clock_ghz;
}

}  // namespace effops::pim
