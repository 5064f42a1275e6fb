// The CUDA side of the ops: device guard, current stream, launch, status to exception.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "attention/merge_states.h"
#include "ops/merge.h"

namespace effops::ops {
namespace {

// torch's stream getter lives in a library that a CPU build of torch does not have, and that is
// loaded with local scope: a link or weak reference would not find it.
void* current_stream(const char* op, int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  EFFOPS_CHECK(get != nullptr, op, ": expected a CUDA build of torch, got one without libtorch_cuda");
  void* stream = nullptr;
  EFFOPS_CHECK(get(device, &stream) == 0, op, ": could not get the current stream of device ", device);
  return stream;
}

void check_launch(const char* op, int status) {
  EFFOPS_CHECK(status == 0, op, ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

std::tuple<Tensor, Tensor> merge_states(Tensor outs, Tensor lses) {
  const torch::stable::accelerator::DeviceGuard guard(Arg("merge_states", "outs", outs).device_index);
  MergeCall call(outs, lses);
  check_launch("merge_states", effops_cuda_merge_states(static_cast<int>(call.p.dtype), call.p.parts, call.p.rows,
                                                        call.p.dim, call.p.outs, call.p.lses, call.p.out, call.p.lse,
                                                        current_stream("merge_states", call.device_index)));
  return {call.out, call.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace effops::ops
