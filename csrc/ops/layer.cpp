// rms_norm and silu_mul.
#include "ops/layer.h"

#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"

namespace effops::ops {

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_offset) {
  const char* op = "rms_norm";
  const Backend backend(op, x);
  Arg a(op, "x", x), w(op, "weight", weight);
  RmsNormProblem p;
  p.dtype = a.dtype();
  EFFOPS_CHECK(a.dim >= 1 && a.size(a.dim - 1) > 0, op, ": x: expected shape [..., D] with D >= 1, got ", a.shape());
  p.dim = a.size(a.dim - 1);
  w.same_dtype(a).same_device(a);
  check_shape(w, {{"D", p.dim}});
  if (w.stride(0) != 1) {
    weight = torch::stable::contiguous(weight);
    w = Arg(op, "weight", weight);
  }
  if (!row_space(a, p.rows)) {
    x = torch::stable::contiguous(x);
    a = Arg(op, "x", x);
    row_space(a, p.rows);
  }
  Tensor y = empty(with_last(a, p.dim), a.type, a);
  p.x = a.data();
  p.weight = w.data();
  p.y = Arg(op, "y", y).mutable_data();
  p.eps = eps;
  p.weight_offset = weight_offset;
  backend.run(&cpu::Kernels::rms_norm, &DeviceLibrary::rms_norm, p);
  return y;
}

Tensor silu_mul(Tensor x) {
  const char* op = "silu_mul";
  const Backend backend(op, x);
  Arg a(op, "x", x);
  SiluMulProblem p;
  p.dtype = a.dtype();
  EFFOPS_CHECK(a.dim >= 1 && a.size(a.dim - 1) % 2 == 0, op, ": x: expected shape [..., 2f], got ", a.shape());
  p.dim = a.size(a.dim - 1) / 2;
  if (!row_space(a, p.rows)) {
    x = torch::stable::contiguous(x);
    a = Arg(op, "x", x);
    row_space(a, p.rows);
  }
  Tensor y = empty(with_last(a, p.dim), a.type, a);
  p.x = a.data();
  p.y = Arg(op, "y", y).mutable_data();
  backend.run(&cpu::Kernels::silu_mul, &DeviceLibrary::silu_mul, p);
  return y;
}

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
}

}  // namespace effops::ops
