#include "ops/threads.h"

#include <torch/csrc/stable/c/shim.h>

namespace effops::ops {
namespace {

void fork(int threads, Parallel::Body body, void* context) {
  struct Call {
    Parallel::Body body;
    void* context;
  } call{body, context};
  torch_parallel_for(
      0, threads, 1,
      [](int64_t begin, int64_t end, void* c) {
        const Call& call = *static_cast<Call*>(c);
        for (int64_t t = begin; t < end; ++t) call.body(call.context, t);
      },
      &call);
}

}  // namespace

Parallel torch_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {static_cast<int>(threads), &fork};
}

}  // namespace effops::ops
