// packed_linear.
#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"
#include "ops/linear_call.h"
#include "ops/packed.h"

namespace effops::ops {
namespace {

// torch's own GEMM, the fastest path for many rows; the residual, contiguous, is added after.
Tensor torch_linear(const Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const LinearProblem& p) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[3] = {from(x), from(weight), from(bias)};
  EFFOPS_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION) == 0,
               "packed_linear: x: torch's linear failed for shape ", Arg("", "", x).shape());
  Tensor y = to<Tensor>(stack[0]);
  if (p.residual != nullptr) {
    const AddProblem add{p.dtype, p.rows * p.out, p.residual, Arg("", "", y).mutable_data()};
    backend.run(&cpu::Kernels::add, &DeviceLibrary::add, add);
  }
  return y;
}

}  // namespace

Tensor packed_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor norm,
                     double norm_eps, bool gated, bool int8_activation, bool batch_invariant) {
  const char* op = "packed_linear";
  const Backend backend(op, x);
  const Arg a(op, "x", x);
  Arg w(op, "weight", weight);
  a.dtype();
  const bool packed = is_packed(w);
  if (!packed) w.same_dtype(a).same_device(a);
  w.rank(2, packed ? "[N, row bytes]" : "[N, K]");
  LinearCall call(op, x, packed ? -1 : w.size(1), w.size(0), bias, residual, norm, norm_eps, gated);
  LinearProblem& p = call.p;
  // Plain weights are torch's on a GPU, and this processor's where device kernels serve its tensors.
  const bool host = a.device_type == aoti_torch_device_type_cpu();
  EFFOPS_CHECK(!batch_invariant || packed || host, op,
               ": batch_invariant: expected a packed weight on devices, where "
               "plain ones are torch's, got True beside a plain one");
  const bool gemm = !packed && (!host || !streams_linear(p.dtype, p.rows, batch_invariant));
  const PackedMatrix matrix = packed ? packed_matrix(w, p.in, a) : PackedMatrix();
  EFFOPS_CHECK(!int8_activation || (packed && matrix.format != PackedFormat::fp8_e4m3), op,
               ": int8_activation: expected False but beside int8 and int4 weights, got True");
  EFFOPS_CHECK(!int8_activation || backend.device() == nullptr, op,
               ": int8_activation: expected False on devices, got True");
  EFFOPS_CHECK(!int8_activation || matrix.group <= kInt8Group, op, ": weight: expected groups of at most ", kInt8Group,
               " inputs beside int8_activation, got ", matrix.group);
  if (backend.device() != nullptr || gemm) {
    if (gated) x = silu_mul(x);
    if (norm && p.in > 0) x = rms_norm(x, *norm, norm_eps, 0);
    if (gemm) return torch_linear(backend, x, weight, bias, p);
    call.replace_x(x);
  }
  if (packed) {
    Tensor y = call.result();
    backend.run(&cpu::Kernels::packed_linear, &DeviceLibrary::packed_linear,
                PackedLinearProblem{p, matrix, int8_activation, batch_invariant});
    return y;
  }
  if (p.in > 1 && w.stride(1) != 1) {
    weight = torch::stable::contiguous(weight);
    w = Arg(op, "weight", weight);
  }
  p.weight = w.data();
  p.weight_row = w.stride(0);
  Tensor y = call.result();
  cpu::kernels().linear(p, torch_threads());
  return y;
}

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace effops::ops
