// The end of every attention call: kernels of the processor or of a device.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "ops/attention.h"

namespace effops::ops {
namespace {

// Rows of a ragged batch past the last offset belong to no sequence: out 0, lse -inf. Results lie in line.
void clear_unowned(const AttentionProblem& p, int64_t rows) {
  const int64_t from = p.cu_q[p.batch];
  const int64_t row = p.out.token * int64_t(size_of(p.wide_out ? compute_type(p.dtype) : p.dtype));
  if (rows <= from) return;
  std::memset(p.out.data + from * row, 0, (rows - from) * row);
  for (int64_t i = from * p.lse.token; i < rows * p.lse.token; ++i) {
    if (p.dtype == DType::f64) {
      reinterpret_cast<double*>(p.lse.data)[i] = -INFINITY;
    } else {
      reinterpret_cast<float*>(p.lse.data)[i] = -INFINITY;
    }
  }
}

}  // namespace

int32_t lse_type(DType t) { return type_of(compute_type(t)); }

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
  run_attention_into(backend, q, p, limits);
  return {out, lse};
}

void run_attention_into(const Backend& backend, const Arg& q, const AttentionProblem& p,
                        const AttentionLimits& limits) {
  if (backend.device() == nullptr) {
    if (p.cu_q) clear_unowned(p, q.size(0));
    return cpu::kernels().attention(p, torch_threads());
  }
  Tensor memory;
  void* workspace = backend.workspace(memory, q, &DeviceLibrary::attention_workspace, p, limits);
  backend.launch(&DeviceLibrary::attention, p, limits, workspace);
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
