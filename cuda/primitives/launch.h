// Starts a kernel of one by-value parameter struct. A launcher returns a status: 0, or what `launch_error` explains.
#pragma once

#include <atomic>

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

// How many blocks of a kernel the current device holds at a time, for grids whose blocks look for work. Tag: one type a
// kernel, since the answer is kept; on the host machine few, so that each has more than one piece of work.
template <class Tag, class Params>
int resident_blocks([[maybe_unused]] void (*kernel)(Params), [[maybe_unused]] int threads,
                    [[maybe_unused]] int64_t shared_bytes, int64_t& blocks) {
#ifdef __CUDACC__
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, an_sm = 0, sms = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device < kDevices) blocks = known[device].load(std::memory_order_relaxed);
  if (device < kDevices && blocks > 0) return 0;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&an_sm, kernel, threads, shared_bytes);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  blocks = int64_t(an_sm > 0 ? an_sm : 1) * sms;
  if (device < kDevices) known[device].store(static_cast<int>(blocks), std::memory_order_relaxed);
#else
  blocks = 3;
#endif
  return 0;
}

}  // namespace effops::device
