// packed_linear on the CPU.
#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"
#include "ops/layer.h"

namespace effops::ops {
namespace {

// torch's own GEMM, the fastest path for many rows; the residual, contiguous, is added after.
Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const LinearProblem& p) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[3] = {from(x), from(weight), from(bias)};
  EFFOPS_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION) == 0,
               "packed_linear: x: torch's linear failed for shape ", Arg("", "", x).shape());
  Tensor y = to<Tensor>(stack[0]);
  if (p.residual != nullptr) {
    const AddProblem add{p.dtype, p.rows * p.out, p.residual, Arg("", "", y).mutable_data()};
    cpu::kernels().add(add, torch_threads());
  }
  return y;
}

}  // namespace

Tensor packed_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor norm,
                     double norm_eps, bool gated) {
  const char* op = "packed_linear";
  const Backend backend(op);
  Arg a(op, "x", x), w(op, "weight", weight);
  LinearProblem p;
  p.dtype = a.dtype();
  w.same_dtype(a).same_device(a);
  w.rank(2, "[N, K]");
  p.in = w.size(1);
  const int64_t row = gated ? 2 * p.in : p.in;
  EFFOPS_CHECK(a.dim >= 1 && a.size(a.dim - 1) == row, op, ": x: expected shape [..., ", row, "], got ", a.shape());
  EFFOPS_CHECK(!norm || !gated, op, ": norm: expected none beside gated, got a tensor");
  p.out = w.size(0);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < a.dim; ++i) p.rows *= a.size(i);
  if (bias) {
    const Arg b(op, "bias", *bias);
    b.same_dtype(a).same_device(a);
    check_shape(b, {{"N", p.out}});
    p.bias = contiguous_data(b, *bias);
  }
  const std::vector<int64_t> sizes = with_last(a, p.out);
  if (residual) {
    const Arg r(op, "residual", *residual);
    r.same_dtype(a).same_device(a);
    EFFOPS_CHECK(r.dim == a.dim && std::equal(sizes.begin(), sizes.end(), r.sizes), op,
                 ": residual: expected the shape of the output, got ", r.shape());
    p.residual = contiguous_data(r, *residual);
    p.residual_row = p.out;
  }
  if (norm) {
    const Arg n(op, "norm", *norm);
    n.same_dtype(a).same_device(a);
    check_shape(n, {{"K", p.in}});
    p.norm = contiguous_data(n, *norm);
    p.norm_eps = norm_eps;
  }
  p.gated = gated;
  if (!streams_linear(p.dtype, p.rows)) {
    if (gated) x = silu_mul(x);
    if (norm && p.in > 0) x = rms_norm(x, *norm, norm_eps, 0);
    return torch_linear(x, weight, bias, p);
  }
  RowSpace rows;
  if (!row_space(a, rows) || rows.size[0] * rows.size[1] != 1) {
    x = torch::stable::contiguous(x);
    a = Arg(op, "x", x);
    row_space(a, rows);
  }
  if (p.in > 1 && w.stride(1) != 1) {
    weight = torch::stable::contiguous(weight);
    w = Arg(op, "weight", weight);
  }
  Tensor y = empty(sizes, a.type, a);
  p.x = a.data();
  p.x_row = rows.stride[2];
  p.weight = w.data();
  p.weight_row = w.stride(0);
  p.y = Arg(op, "y", y).mutable_data();
  p.y_row = p.out;
  cpu::kernels().linear(p, torch_threads());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }

}  // namespace effops::ops
