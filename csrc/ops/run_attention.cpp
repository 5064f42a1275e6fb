// The end of every attention call: kernels of the processor or of a device.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "ops/attention.h"

namespace effops::ops {
namespace {

// Rows of a ragged batch past the last offset belong to no sequence: out 0, lse -inf.
void clear_unowned(const Arg& out, const Arg& lse, int64_t from, DType dtype) {
  const int64_t rows = out.size(0) - from;
  if (rows <= 0) return;
  std::memset(out.mutable_data() + from * out.stride(0) * size_of(dtype), 0, rows * out.stride(0) * size_of(dtype));
  const int64_t begin = from * lse.stride(0), end = out.size(0) * lse.stride(0);
  for (int64_t i = begin; i < end; ++i) {
    if (dtype == DType::f64) {
      reinterpret_cast<double*>(lse.mutable_data())[i] = -INFINITY;
    } else {
      reinterpret_cast<float*>(lse.mutable_data())[i] = -INFINITY;
    }
  }
}

}  // namespace

int32_t lse_type(DType t) { return type_of(t == DType::f64 ? DType::f64 : DType::f32); }

void check_attention_dtype(const Backend& backend, const Arg& q) {
  if (backend.device() == nullptr) return;
  EFFOPS_CHECK(q.dtype() != DType::f64, q.op, ": q: expected dtype float32, bfloat16 or float16 on ",
               backend.device()->name, ", got float64");
}

std::tuple<Tensor, Tensor> run_attention(const Backend& backend, const Arg& q, AttentionProblem& p,
                                         const AttentionLimits& limits) {
  const bool ragged = p.cu_q != nullptr;
  Tensor out = empty(with_last(q, p.v_dim), q.type, q);
  Tensor lse = empty(std::vector<int64_t>(q.sizes, q.sizes + q.dim - 1), lse_type(p.dtype), q);
  const Arg out_arg(q.op, "out", out), lse_arg(q.op, "lse", lse);
  p.out = ragged ? view3(out_arg, out_arg.mutable_data()) : view4(out_arg, out_arg.mutable_data());
  p.lse = ragged ? rows2(lse_arg, lse_arg.mutable_data()) : rows3(lse_arg, lse_arg.mutable_data());
  if (backend.device() == nullptr) {
    if (ragged) clear_unowned(out_arg, lse_arg, p.cu_q[p.batch], p.dtype);
    cpu::kernels().attention(p, torch_threads());
    return {out, lse};
  }
  Tensor memory;
  void* workspace = backend.workspace(memory, q, &DeviceLibrary::attention_workspace, p, limits);
  backend.launch(&DeviceLibrary::attention, p, limits, workspace);
  return {out, lse};
}

Tensor zeros(const Arg& like, const char* name, const std::vector<int64_t>& sizes, int32_t type, char*& data) {
  Tensor t = empty(sizes, type, like);
  const Arg a(like.op, name, t);
  data = a.mutable_data();
  if (a.device_type == aoti_torch_device_type_cpu()) {
    if (a.numel() > 0) std::memset(data, 0, a.numel() * size_of(a.dtype()));
  } else {
    torch::stable::zero_(t);
  }
  return t;
}

void run_attention_backward(const Backend& backend, const Arg& q, const AttentionProblem& p,
                            const AttentionGradients& g, const AttentionLimits& limits) {
  if (backend.device() == nullptr) return cpu::kernels().attention_backward(p, g, torch_threads());
  Tensor memory;
  void* workspace = backend.workspace(memory, q, &DeviceLibrary::attention_backward_workspace, p, limits);
  backend.launch(&DeviceLibrary::attention_backward, p, g, limits, workspace);
}

}  // namespace effops::ops
