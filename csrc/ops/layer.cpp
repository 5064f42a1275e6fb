// rms_norm, rotary, silu_mul and packed_linear on the CPU.
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "ops/tensor.h"
#include "ops/threads.h"

namespace effops::ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Can the rows of x be numbered without a copy: last dimension contiguous, at most three outer ones
// once neighbours that lie in line are joined.
bool row_space(const Arg& x, RowSpace& rows) {
  if (x.numel() == 0) {  // torch calls it contiguous whatever its strides
    rows.size[0] = 0;
    return true;
  }
  if (x.size(x.dim - 1) > 1 && x.stride(x.dim - 1) != 1) return false;
  int at = 3;
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  for (int64_t i = x.dim - 1; i-- > 0;) {
    if (x.size(i) == 1) continue;
    if (at < 3 && x.stride(i) == stride[at] * size[at]) {
      size[at] *= x.size(i);
      continue;
    }
    if (at == 0) return false;
    --at;
    size[at] = x.size(i);
    stride[at] = x.stride(i);
  }
  std::copy(size, size + 3, rows.size);
  std::copy(stride, stride + 3, rows.stride);
  return true;
}

std::vector<int64_t> with_last(const Arg& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  sizes.back() = last;
  return sizes;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps, double weight_offset) {
  const char* op = "rms_norm";
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
  cpu::kernels().rms_norm(p, torch_threads());
  return y;
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions) {
  const char* op = "rotary";
  Arg a(op, "x", x), c(op, "cos", cos), s(op, "sin", sin);
  const Arg pos(op, "positions", positions);
  RotaryProblem p;
  p.dtype = a.dtype();
  a.rank(4, "[B, T, H, D]");
  p.dim = a.size(3);
  c.is(type_float32(), "float32").same_device(a);
  c.rank(2, "[P, R/2]");
  s.is(type_float32(), "float32").same_device(a);
  check_shape(s, {{"P", c.size(0)}, {"R/2", c.size(1)}});
  p.half = c.size(1);
  EFFOPS_CHECK(2 * p.half <= p.dim, op, ": cos: expected R/2 up to D/2 = ", p.dim / 2, ", got shape ", c.shape());
  pos.is(type_int32(), "int32").same_device(a);
  check_shape(pos, {{"B", a.size(0)}, {"T", a.size(1)}});
  p.positions = reinterpret_cast<const int32_t*>(pos.data());
  p.positions_batch = pos.stride(0);
  p.positions_token = pos.stride(1);
  for (int64_t b = 0; b < a.size(0); ++b)
    for (int64_t t = 0; t < a.size(1); ++t) {
      const int64_t v = p.positions[b * p.positions_batch + t * p.positions_token];
      EFFOPS_CHECK(v >= 0 && v < c.size(0), op, ": positions: expected values in [0, ", c.size(0), "), got ", v,
                   " at index [", b, ", ", t, "]");
    }
  for (auto [arg, tensor] : {std::pair(&c, &cos), std::pair(&s, &sin)}) {
    if (arg->stride(1) == 1 && arg->stride(0) == p.half) continue;
    *tensor = torch::stable::contiguous(*tensor);
    *arg = Arg(op, arg->name, *tensor);
  }
  if (p.dim > 1 && a.stride(3) != 1) {
    x = torch::stable::contiguous(x);
    a = Arg(op, "x", x);
  }
  for (int i = 0; i < 3; ++i) {
    p.rows.size[i] = a.size(i);
    p.rows.stride[i] = a.stride(i);
  }
  Tensor y = empty(with_last(a, p.dim), a.type, a);
  p.x = a.data();
  p.y = Arg(op, "y", y).mutable_data();
  p.cos = reinterpret_cast<const float*>(c.data());
  p.sin = reinterpret_cast<const float*>(s.data());
  cpu::kernels().rotary(p, torch_threads());
  return y;
}

Tensor silu_mul(Tensor x) {
  const char* op = "silu_mul";
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
  cpu::kernels().silu_mul(p, torch_threads());
  return y;
}

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

Tensor packed_linear(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual) {
  const char* op = "packed_linear";
  Arg a(op, "x", x), w(op, "weight", weight);
  LinearProblem p;
  p.dtype = a.dtype();
  w.same_dtype(a).same_device(a);
  w.rank(2, "[N, K]");
  EFFOPS_CHECK(a.dim >= 1 && a.size(a.dim - 1) == w.size(1), op, ": x: expected shape [..., ", w.size(1), "], got ",
               a.shape());
  p.in = w.size(1);
  p.out = w.size(0);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < a.dim; ++i) p.rows *= a.size(i);
  Tensor bias_rows, residual_rows;
  if (bias) {
    const Arg b(op, "bias", *bias);
    b.same_dtype(a).same_device(a);
    check_shape(b, {{"N", p.out}});
    bias_rows = b.stride(0) == 1 ? *bias : torch::stable::contiguous(*bias);
    p.bias = Arg(op, "bias", bias_rows).data();
  }
  const std::vector<int64_t> sizes = with_last(a, p.out);
  if (residual) {
    const Arg r(op, "residual", *residual);
    r.same_dtype(a).same_device(a);
    EFFOPS_CHECK(r.dim == a.dim && std::equal(sizes.begin(), sizes.end(), r.sizes), op,
                 ": residual: expected the shape of the output, got ", r.shape());
    residual_rows = torch::stable::contiguous(*residual);
    p.residual = Arg(op, "residual", residual_rows).data();
    p.residual_row = p.out;
  }
  if (!streams_linear(p.dtype, p.rows)) return torch_linear(x, weight, bias, p);
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
  cpu::kernels().linear(p, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace effops::ops
