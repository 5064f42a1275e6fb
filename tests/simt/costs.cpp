// What the machine's operations cost, in microseconds on one core.
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "primitives/ldmatrix.h"
#include "primitives/mma.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

// The least of several runs of one block, for each of `count` repetitions that every warp does.
template <class Body>
void measure(const char* name, int threads, int count, const Body& body) {
  double best = 1e30;
  for (int i = 0; i < 7; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    run({1, threads, 16384}, body);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, took.count());
  }
  std::printf("%-32s %8.2f\n", name, best / count);
}

template <class T>
void measure_mma(const char* name) {
  constexpr int kCount = 1000;
  measure(name, 128, 4 * kCount, [] {
    float d[8][4] = {};
    uint32_t a[4] = {1, 2, 3, 4}, b[8][2] = {{5, 6}, {7, 8}};
    for (int i = 0; i < kCount; ++i) mma_row<T>(d, a, b);
  });
}

int main() {
  constexpr int kCount = 2000;
  measure("launch of 128 threads", 128, 1, [] {});
  measure("shuffle of a warp", 128, 4 * kCount, [] {
    int x = lane_index();
    for (int i = 0; i < kCount; ++i) x = __shfl_xor_sync(kAllLanes, x, 1);
  });
  measure("__syncthreads of 128 threads", 128, kCount, [] {
    for (int i = 0; i < kCount; ++i) __syncthreads();
  });
  measure_mma<bf16>("mma of 8 tiles, bf16");
  measure_mma<f16>("mma of 8 tiles, f16");
  measure("ldmatrix.x4", 128, 4 * kCount, [] {
    for (int i = 0; i < 32; i += 4) *reinterpret_cast<uint32_t*>(shared_memory() + threadIdx.x * 32 + i) = 0;
    __syncthreads();
    const void* rows[1] = {shared_memory() + threadIdx.x * 32};
    uint32_t to[1][4];
    for (int i = 0; i < kCount; ++i) ldmatrix_x4(to, rows);
  });
  measure("a thread's float of shared memory", 128, 128 * kCount, [] {
    volatile float* x = reinterpret_cast<volatile float*>(shared_memory()) + threadIdx.x;
    *x = 0;
    for (int i = 1; i < kCount; ++i) *x = float(i);
  });
  return 0;
}

}  // namespace
}  // namespace effops::test

int main() { return effops::test::main(); }
