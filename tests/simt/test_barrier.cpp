#include "primitives/barrier.h"

#include "primitives/vector.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

TEST(block_barrier) {
  for (int threads : {1, 31, 33, 128, 1024}) {
    Global<int> out(threads);
    int* at = out.get();
    run({1, threads, threads * 4}, [=] {
      int* word = reinterpret_cast<int*>(shared_memory());
      const int t = threadIdx.x;
      for (int round = 0; round < 3; ++round) {
        word[t] = t * 10 + round;
        __syncthreads();
        at[t] = word[(t + 1) % blockDim.x];
        __syncthreads();
      }
    });
    for (int t = 0; t < threads; ++t) CHECK(out[t] == (t + 1) % threads * 10 + 2, threads, " ", t);
  }
}

// Warp 0 makes numbers in a ring of two stages, the others use them.
TEST(named_barriers_of_producer_and_consumers) {
  constexpr int kThreads = 128, kRounds = 9;
  Global<int> out(kThreads);
  int* at = out.get();
  run({1, kThreads, 2 * 32 * 4}, [=] {
    int* ring = reinterpret_cast<int*>(shared_memory());
    constexpr int kFull = 1, kEmpty = 3;
    if (warp_index() == 0) {
      for (int i = 0; i < kRounds; ++i) {
        if (i >= 2) named_barrier_sync(kEmpty + i % 2, kThreads);
        ring[i % 2 * 32 + lane_index()] = i * 100 + lane_index();
        named_barrier_arrive(kFull + i % 2, kThreads);
      }
      return;
    }
    int sum = 0;
    for (int i = 0; i < kRounds; ++i) {
      named_barrier_sync(kFull + i % 2, kThreads);
      sum += ring[i % 2 * 32 + (lane_index() + 1) % 32];
      if (i + 2 < kRounds) named_barrier_arrive(kEmpty + i % 2, kThreads);
    }
    at[threadIdx.x] = sum;
  });
  for (int t = 32; t < kThreads; ++t) CHECK(out[t] == 3600 + kRounds * ((t + 1) % 32), t, ": ", out[t]);
}

}  // namespace
}  // namespace effops::test
