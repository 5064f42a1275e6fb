// cp.async: 16 bytes from global to shared memory, past the registers. A copy can be seen by its own thread after
// copy_wait, by others after a barrier behind that.
#pragma once

#include "primitives/shared_memory.h"

namespace effops::device {

// The first `bytes` (0 to 16) are read, the rest of the 16 become zero; both addresses 16-byte aligned. With 0 bytes
// `from` is not read. Past the L1 cache; the L2 fetches the line's other chunks, which the neighbours ask for.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
#ifdef __CUDACC__
  if (bytes == 0) {  // `from` may be no address at all
    *static_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    return;
  }
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
#else
  simt::copy_async(to, from, bytes);
#endif
}

// Closes the group of the thread's copies since the last commit.
__device__ inline void copy_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  simt::copy_commit();
#endif
}

// Waits until at most kPending of the thread's groups, the youngest, are under way.
template <int kPending>
__device__ void copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#else
  simt::copy_wait(kPending);
#endif
}

}  // namespace effops::device
