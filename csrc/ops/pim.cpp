// pim_gemv: matrices in memory banks times vectors, as the units at the banks compute them.
#include "common/pim_problem.h"
#include "ops/attention.h"
#include "ops/backend.h"

namespace effops::ops {
namespace {

// What the units give back, [B, M, out_features, sums].
Tensor pim_gemv(Tensor x, Tensor banks, int64_t out_features, int64_t sum_values, int64_t lanes, OptionalTensor rows,
                OptionalTensor columns, int64_t channels, bool narrow_results) {
  const char* op = "pim_gemv";
  const Backend backend(op, x);
  const Arg vectors(op, "x", x), matrix(op, "banks", banks);
  PimGemvProblem p;
  p.dtype = vectors.dtype();
  EFFOPS_CHECK(backend.device() == nullptr || p.dtype != DType::f64, op,
               ": x: expected float32, bfloat16 or float16 on this device, got float64");
  vectors.rank(3, "[B, M, K]");
  matrix.rank(5, "[B, tiles, chunks, units, values]").same_dtype(vectors).same_device(vectors);
  p.batch = vectors.size(0);
  p.rows = vectors.size(1);
  p.in = vectors.size(2);
  check_shape(matrix, {{"B", p.batch}, {"tiles", -1}, {"chunks", -1}, {"units", -1}, {"values", -1}});
  p.tiles = matrix.size(1);
  p.chunks = matrix.size(2);
  p.units = matrix.size(3);
  p.row_values = matrix.size(4);
  p.out = out_features;
  EFFOPS_CHECK(p.units > 0 && p.row_values > 0, op, ": banks: expected units and values of 1 or more, got shape ",
               matrix.shape());
  EFFOPS_CHECK(p.out >= 0 && p.out <= p.tiles * p.units, op,
               ": out_features: expected 0 to tiles * units = ", p.tiles * p.units, ", got ", p.out);
  EFFOPS_CHECK(p.in <= p.chunks * p.row_values, op,
               ": x: expected K of at most chunks * values = ", p.chunks * p.row_values, ", got ", p.in);
  EFFOPS_CHECK(lanes >= 1 && lanes <= PimGemvProblem::kMostLanes && (lanes & (lanes - 1)) == 0, op,
               ": lanes: expected a power of two up to ", PimGemvProblem::kMostLanes, ", got ", lanes);
  EFFOPS_CHECK(sum_values >= 1 && p.row_values % sum_values == 0, op,
               ": sum_values: expected a divisor of values = ", p.row_values, ", got ", sum_values);
  EFFOPS_CHECK(channels >= 1, op, ": channels: expected 1 or more, got ", channels);
  p.lanes = lanes;
  p.sum_values = sum_values;
  p.sums = (p.in + sum_values - 1) / sum_values;
  p.channels = channels;
  p.narrow = narrow_results;
  const Values<int32_t> out_lens(op, "rows", rows, {"B", p.batch}, vectors);
  const Values<int32_t> in_lens(op, "columns", columns, {"B", p.batch}, vectors);
  check_range(op, "rows", out_lens, 0, p.out, "out_features");
  check_range(op, "columns", in_lens, 0, p.in, "K");
  p.out_lens = out_lens.get();
  p.in_lens = in_lens.get();
  p.x = vectors.data();
  p.x_batch = vectors.stride(0), p.x_row = vectors.stride(1), p.x_value = vectors.stride(2);
  p.banks = matrix.data();
  p.bank_batch = matrix.stride(0), p.bank_tile = matrix.stride(1), p.bank_chunk = matrix.stride(2);
  p.bank_unit = matrix.stride(3), p.bank_value = matrix.stride(4);
  Tensor results = empty({p.batch, p.rows, p.out, p.sums}, lse_type(p.dtype), vectors);
  p.results = Arg(op, "results", results).mutable_data();
  if (p.batch * p.rows * p.out * p.sums > 0) backend.run(&cpu::Kernels::pim_gemv, &DeviceLibrary::pim_gemv, p);
  return results;
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("pim_gemv", TORCH_BOX(&pim_gemv)); }

}  // namespace effops::ops
