#include "ops/linear_call.h"

#include <torch/csrc/stable/ops.h>

namespace effops::ops {

LinearCall::LinearCall(const char* op, const Tensor& x_, int64_t in, int64_t out, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& norm, double norm_eps, bool gated)
    : x(op, "x", x_), x_(x_), bias_(bias), residual_(residual), norm_(norm) {
  p.dtype = x.dtype();
  if (in < 0 && x.dim >= 1) {
    in = x.size(x.dim - 1);
    EFFOPS_CHECK(!gated || in % 2 == 0, op, ": x: expected shape [..., 2K], got ", x.shape());
    if (gated) in /= 2;
  }
  const int64_t row = gated ? 2 * in : in;
  EFFOPS_CHECK(x.dim >= 1 && x.size(x.dim - 1) == row, op, ": x: expected shape [..., ",
               in < 0 ? "K" : std::to_string(row), "], got ", x.shape());
  EFFOPS_CHECK(!norm || !gated, op, ": norm: expected none beside gated, got a tensor");
  p.in = in;
  p.out = out;
  p.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim; ++i) p.rows *= x.size(i);
  if (bias) {
    const Arg b(op, "bias", *bias);
    b.same_dtype(x).same_device(x);
    check_shape(b, {{"N", p.out}});
    p.bias = contiguous_data(b, *bias_);
  }
  sizes_ = with_last(x, p.out);
  if (residual) {
    const Arg r(op, "residual", *residual);
    r.same_dtype(x).same_device(x);
    EFFOPS_CHECK(r.dim == x.dim && std::equal(sizes_.begin(), sizes_.end(), r.sizes), op,
                 ": residual: expected the shape of the output, got ", r.shape());
    p.residual = contiguous_data(r, *residual_);
    p.residual_row = p.out;
  }
  if (norm) {
    const Arg n(op, "norm", *norm);
    n.same_dtype(x).same_device(x);
    check_shape(n, {{"K", p.in}});
    p.norm = contiguous_data(n, *norm_);
    p.norm_eps = norm_eps;
  }
  p.gated = gated;
}

void LinearCall::replace_x(const Tensor& prepared) {
  x_ = prepared;
  x = Arg(x.op, "x", x_);
  p.norm = nullptr;
  p.gated = false;
}

Tensor LinearCall::result() {
  RowSpace rows;
  if (!row_space(x, rows) || rows.size[0] * rows.size[1] != 1) {
    x_ = torch::stable::contiguous(x_);
    x = Arg(x.op, "x", x_);
    row_space(x, rows);
  }
  p.x = x.data();
  p.x_row = rows.stride[2];
  Tensor y = empty(sizes_, x.type, x);
  p.y = Arg(x.op, "y", y).mutable_data();
  p.y_row = p.out;
  return y;
}

}  // namespace effops::ops
