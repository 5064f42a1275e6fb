// merge_states.
#include <torch/csrc/stable/ops.h>

#include "ops/backend.h"

namespace effops::ops {
namespace {

std::tuple<Tensor, Tensor> merge_states(Tensor outs, Tensor lses) {
  const char* op = "merge_states";
  const Backend backend(op, outs);
  outs = torch::stable::contiguous(outs);
  lses = torch::stable::contiguous(lses);
  const Arg o(op, "outs", outs), l(op, "lses", lses);
  MergeProblem p;
  p.dtype = p.out_dtype = o.dtype();
  const bool wide = p.dtype == DType::f64;
  l.is(wide ? type_of(DType::f64) : type_float32(), wide ? "float64" : "float32").same_device(o);
  EFFOPS_CHECK(o.dim >= 2 && o.size(0) > 0, op, ": outs: expected shape [P, ..., D] with P >= 1, got ", o.shape());
  EFFOPS_CHECK(l.dim == o.dim - 1 && std::equal(l.sizes, l.sizes + l.dim, o.sizes), op,
               ": lses: expected the shape of outs without its last dimension, got ", l.shape(), " for ", o.shape());
  p.parts = o.size(0);
  p.dim = o.size(o.dim - 1);
  p.rows = l.numel() / p.parts;
  Tensor out = empty(std::vector<int64_t>(o.sizes + 1, o.sizes + o.dim), o.type, o);
  Tensor lse = empty(std::vector<int64_t>(l.sizes + 1, l.sizes + l.dim), l.type, l);
  p.outs = o.data();
  p.lses = l.data();
  p.out = Arg(op, "out", out).mutable_data();
  p.lse = Arg(op, "lse", lse).mutable_data();
  backend.run(&cpu::Kernels::merge_states, &DeviceLibrary::merge_states, p);
  return {out, lse};
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace effops::ops
