// Starts a kernel of one by-value parameter struct. A launcher returns a status: 0, or what `launch_error` explains.
#pragma once

#include "primitives/platform.h"

namespace effops::device {

inline constexpr int kUnsupported = -1;  // a launcher's status: no kernel for this dtype or size

struct Launch {
  const char* name;  // of the kernel, for reports
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;
  void* stream = nullptr;
};

template <class Params>
int launch(const Launch& l, void (*kernel)(Params), const Params& p) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return 0;
#ifdef __CUDACC__
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (l.shared_bytes > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<l.grid, l.threads, l.shared_bytes, static_cast<cudaStream_t>(l.stream)>>>(p);
  return cudaGetLastError();
#else
  return simt::launch(l.name, l.grid, l.threads, l.shared_bytes, [kernel, p] { kernel(p); });
#endif
}

}  // namespace effops::device
