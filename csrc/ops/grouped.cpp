// grouped_mm and the gradient of its weight.
#include "ops/grouped.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

namespace effops::ops {
namespace {

Tensor grouped_mm(Tensor x, Tensor w, Tensor offsets, OptionalTensor bias, OptionalTensor in_sizes,
                  OptionalTensor out_sizes, bool batch_invariant) {
  const char* op = "grouped_mm";
  const Backend backend(op, x);
  Arg a(op, "x", x);
  const Arg matrices(op, "w", w);
  GroupedProblem p;
  p.dtype = a.dtype();
  a.rank(2, "[N, d]");
  matrices.same_dtype(a).same_device(a);
  check_shape(matrices, {{"E", -1}, {"d", a.size(1)}, {"f", -1}});
  p.rows = a.size(0);
  p.groups = matrices.size(0);
  p.in = matrices.size(1);
  p.out = matrices.size(2);
  p.offsets = group_ends(Arg(op, "offsets", offsets), offsets, a, p.groups, p.rows);
  if (bias) {
    const Arg b(op, "bias", *bias);
    b.same_dtype(a).same_device(a);
    check_shape(b, {{"E", p.groups}, {"f", p.out}});
    p.bias = contiguous_data(b, *bias);
  }
  const Values<int32_t> inputs(op, "in_sizes", in_sizes, {"E", p.groups}, a);
  const Values<int32_t> outputs(op, "out_sizes", out_sizes, {"E", p.groups}, a);
  check_range(op, "in_sizes", inputs, 0, p.in, "d");
  check_range(op, "out_sizes", outputs, 0, p.out, "f");
  p.in_sizes = inputs.get();
  p.out_sizes = outputs.get();
  p.invariant = batch_invariant;
  take_weight(p, matrices, w, false);
  a = rows_in_line(a, x);
  Tensor y = empty({p.rows, p.out}, a.type, a);
  p.x = a.data();
  p.x_row = a.stride(0);
  p.y = Arg(op, "y", y).mutable_data();
  p.y_row = p.out;
  backend.device() ? launch_grouped(backend, p, a) : cpu::kernels().grouped(p, torch_threads());
  return y;
}

Tensor grouped_mm_weight_gradient(Tensor x, Tensor dy, Tensor offsets, OptionalTensor in_sizes,
                                  OptionalTensor out_sizes) {
  const char* op = "grouped_mm_weight_gradient";
  const Backend backend(op, x);
  Arg a(op, "x", x), d(op, "dy", dy);
  GroupedGradientProblem p;
  p.dtype = a.dtype();
  a.rank(2, "[N, d]");
  d.same_dtype(a).same_device(a);
  check_shape(d, {{"N", a.size(0)}, {"f", -1}});
  const Arg ends(op, "offsets", offsets);
  ends.is(type_int32(), "int32").rank(1, "[E]");
  p.rows = a.size(0);
  p.in = a.size(1);
  p.out = d.size(1);
  p.groups = ends.size(0);
  p.offsets = group_ends(ends, offsets, a, p.groups, p.rows);
  const Values<int32_t> inputs(op, "in_sizes", in_sizes, {"E", p.groups}, a);
  const Values<int32_t> outputs(op, "out_sizes", out_sizes, {"E", p.groups}, a);
  check_range(op, "in_sizes", inputs, 0, p.in, "d");
  check_range(op, "out_sizes", outputs, 0, p.out, "f");
  p.in_sizes = inputs.get();
  p.out_sizes = outputs.get();
  a = rows_in_line(a, x);
  d = rows_in_line(d, dy);
  Tensor dw = empty({p.groups, p.in, p.out}, a.type, a);
  p.x = a.data();
  p.x_row = a.stride(0);
  p.dy = d.data();
  p.dy_row = d.stride(0);
  p.dw = Arg(op, "dw", dw).mutable_data();
  if (backend.device()) {
    Tensor memory;
    void* workspace = backend.workspace(memory, a, &DeviceLibrary::grouped_gradient_workspace, p);
    backend.launch(&DeviceLibrary::grouped_gradient, p, workspace);
  } else {
    cpu::kernels().grouped_gradient(p, torch_threads());
  }
  return dw;
}

}  // namespace

const int32_t* group_ends(const Arg& offsets, Tensor& t, const Arg& like, int64_t groups, int64_t rows) {
  const char* op = offsets.op;
  offsets.is(type_int32(), "int32").same_device(like);
  check_shape(offsets, {{"E", groups}});
  EFFOPS_CHECK(rows <= std::numeric_limits<int32_t>::max(), op, ": ", like.name, ": expected N below 2^31, got shape ",
               like.shape());
  const Readable<int32_t> ends(offsets);
  for (int64_t g = 0, last = 0; ends && g < groups; last = ends.at(g++)) {
    EFFOPS_CHECK(ends.at(g) >= last, op, ": offsets: expected ends that do not decrease from ", last, ", got ",
                 ends.at(g), " at index ", g);
    EFFOPS_CHECK(ends.at(g) <= rows, op, ": offsets: expected values up to ", rows, " (N), got ", ends.at(g),
                 " at index ", g);
  }
  return reinterpret_cast<const int32_t*>(contiguous_data(offsets, t));
}

void take_weight(GroupedProblem& p, Arg w, Tensor& t, bool out_first) {
  const int out = out_first ? 1 : 2, in = 3 - out;
  auto near = [&](int d) { return w.size(d) <= 1 || w.stride(d) == 1; };
  if (!near(in) && !near(out)) {
    t = torch::stable::contiguous(t);
    w = Arg(w.op, w.name, t);
  }
  p.layout = near(in) ? WeightLayout::rows : WeightLayout::columns;
  p.w = w.data();
  p.w_group = w.stride(0);
  p.w_in = p.layout == WeightLayout::rows ? 1 : w.stride(in);
  p.w_out = p.layout == WeightLayout::rows ? w.stride(out) : 1;
}

Arg rows_in_line(Arg a, Tensor& t) {
  if (a.size(1) <= 1 || a.stride(1) == 1) return a;
  t = torch::stable::contiguous(t);
  return {a.op, a.name, t};
}

void launch_grouped(const Backend& backend, const GroupedProblem& p, const Arg& like) {
  Tensor memory;
  void* workspace = backend.workspace(memory, like, &DeviceLibrary::grouped_workspace, p);
  backend.launch(&DeviceLibrary::grouped, p, workspace);
}

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_mm_weight_gradient", TORCH_BOX(&grouped_mm_weight_gradient));
}

}  // namespace effops::ops
