// quantized_linear on the CPU: packed_linear of a weight in few bits.
#include "common/packed_problem.h"
#include "ops/backend.h"
#include "ops/linear_call.h"

namespace effops::ops {
namespace {

// The weight's memory, as common/packed_problem.h says; tensors that are not contiguous become copies.
void weight_of(const char* op, PackedLinearProblem& p, const Arg& x, Tensor& data, Tensor& scales,
               OptionalTensor& zeros, int64_t bits) {
  const int64_t panels = p.panels();
  EFFOPS_CHECK(bits == 4 || bits == 8, op, ": bits: expected 4 or 8, got ", bits);
  const Arg s(op, "scales", scales);
  s.is(type_float32(), "float32").same_device(x);
  check_shape(s, {{"panels", panels}, {"groups", -1}, {"32", kPackedPanel}});
  const int64_t groups = s.size(1);
  EFFOPS_CHECK(groups == 0 ? p.linear.in == 0 : p.linear.in % groups == 0, op, ": scales: expected a number of groups ",
               "that divides K = ", p.linear.in, ", got ", groups);
  p.bits = static_cast<int>(bits);
  p.group = groups == 0 ? 0 : p.linear.in / groups;
  EFFOPS_CHECK(groups <= 1 || p.group % kPackedSteps == 0, op, ": scales: expected groups of a multiple of ",
               kPackedSteps, " inputs, got ", p.group);
  const Arg d(op, "data", data);
  if (bits == 4) {
    d.is(type_int32(), "int32");
  } else {
    d.is(aoti_torch_dtype_int8(), "int8");
  }
  d.same_device(x);
  check_shape(d,
              {{"panels", panels}, {"inputs", p.padded_in() / (bits == 4 ? kPackedSteps : 1)}, {"32", kPackedPanel}});
  p.data = contiguous_data(d, data);
  p.scales = reinterpret_cast<const float*>(contiguous_data(s, scales));
  if (!zeros) return;
  const Arg z(op, "zeros", *zeros);
  z.is(type_float32(), "float32").same_device(x);
  check_shape(z, {{"panels", panels}, {"groups", groups}, {"32", kPackedPanel}});
  p.zeros = reinterpret_cast<const float*>(contiguous_data(z, *zeros));
}

Tensor quantized_linear(Tensor x, Tensor data, Tensor scales, OptionalTensor zeros, int64_t features, int64_t bits,
                        OptionalTensor bias, OptionalTensor residual, OptionalTensor norm, double norm_eps,
                        bool gated) {
  const char* op = "quantized_linear";
  const Backend backend(op);
  EFFOPS_CHECK(features >= 0, op, ": features: expected 0 or more, got ", features);
  LinearCall call(op, x, -1, features, bias, residual, norm, norm_eps, gated);
  EFFOPS_CHECK(call.p.dtype != DType::f64, op, ": x: expected dtype float32, bfloat16 or float16, got float64");
  PackedLinearProblem p;
  p.linear = call.p;
  weight_of(op, p, call.x, data, scales, zeros, bits);
  Tensor y = call.result();
  p.linear = call.p;
  cpu::kernels().packed_linear(p, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("quantized_linear", TORCH_BOX(&quantized_linear)); }

}  // namespace effops::ops
