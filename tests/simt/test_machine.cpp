// Launches: indices, parameters, limits, several at a time, the same result in every order.
#include <atomic>
#include <thread>

#include "primitives/launch.h"
#include "primitives/reduce.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

struct Params {
  int* out;
  int padding[30];
  int value;
};

__global__ void write_indices(const __grid_constant__ Params p) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  p.out[block * blockDim.x + threadIdx.x] = block * 1000 + int(threadIdx.x) + p.value;
}

TEST(every_thread_runs_once) {
  const dim3 grid(3, 4, 5);
  Global<int> out(60 * 33);
  CHECK(launch({"write_indices", grid, 33}, write_indices, {out.get(), {}, 7}) == 0, simt::last_report());
  for (int i = 0; i < 60 * 33; ++i) CHECK(out[i] == i / 33 * 1000 + i % 33 + 7, i, ": ", out[i]);
  CHECK(launch({"write_indices", dim3(3, 0, 1), 33}, write_indices, {nullptr, {}, 0}) == 0, "an empty grid");
}

TEST(launch_limits) {
  const auto nothing = [] {};
  const auto says = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(says(report_of({1, 1025}, nothing), "1025 threads a block"), simt::last_report());
  CHECK(says(report_of({1, 32, 227 * 1024 + 1}, nothing), "bytes of shared memory"), simt::last_report());
  CHECK(says(report_of({dim3(1, 65536), 32}, nothing), "a grid of 1 x 65536 x 1"), simt::last_report());
  run({1, 1024, 227 * 1024}, nothing);
}

TEST(shared_memory_begins_as_nan) {
  if (std::getenv("EFFOPS_SIMT_CHECK") == nullptr) return;  // otherwise the read is reported
  Global<float> out(8);
  float* at = out.get();
  run({8, 1, 4}, [=] {
    float* x = reinterpret_cast<float*>(shared_memory());
    at[blockIdx.x] = *x;
    *x = 1;
  });
  for (int i = 0; i < 8; ++i) CHECK(std::isnan(out[i]), i);
}

TEST(atomics_of_all_blocks) {
  constexpr int kBlocks = 50, kThreads = 64;
  Global<int> sum(1), top(1), bottom(1, 1000000);
  Global<unsigned long long> tickets(1);
  Global<float> floats(1);
  int *s = sum.get(), *t = top.get(), *b = bottom.get();
  unsigned long long* n = tickets.get();
  float* f = floats.get();
  Global<int> seen(kBlocks * kThreads);
  int* at = seen.get();
  run({kBlocks, kThreads, 4}, [=] {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    atomicAdd(s, i);
    atomicMax(t, i);
    atomicMin(b, i + 5);
    atomicAdd(f, 1.0f);
    at[atomicAdd(n, 1ull)] += 1;
    int* local = reinterpret_cast<int*>(shared_memory());
    if (threadIdx.x == 0) *local = 0;
    __syncthreads();
    atomicAdd(local, 1);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(s, *local);
  });
  const int all = kBlocks * kThreads;
  CHECK(sum[0] == all * (all - 1) / 2 + all && top[0] == all - 1 && bottom[0] == 5, sum[0]);
  CHECK(floats[0] == all && tickets[0] == size_t(all), floats[0]);
  for (int i = 0; i < all; ++i) CHECK(seen[i] == 1, i);
}

TEST(same_result_in_every_order) {
  std::vector<float> first;
  const char* seed_before = std::getenv("EFFOPS_SIMT_SEED");
  const std::string seed = seed_before ? seed_before : "";
  for (const char* order : {"", "1", "2", "3"})
    for (const char* threads : {"1", "2", "5"}) {
      setenv("EFFOPS_SIMT_SEED", order, 1);
      setenv("EFFOPS_SIMT_THREADS", threads, 1);
      Global<float> out(40);
      float* at = out.get();
      run({40, 96, 128}, [=] {
        const float x = std::sin(float(blockIdx.x * 96 + threadIdx.x));
        const float sum = reduce_block(x, Sum(), 0.0f, reinterpret_cast<float*>(shared_memory()));
        if (threadIdx.x == 0) at[blockIdx.x] = sum;
      });
      if (first.empty()) first.assign(at, at + 40);
      for (int i = 0; i < 40; ++i) CHECK(out[i] == first[i], order, " ", threads, " ", i);
    }
  setenv("EFFOPS_SIMT_SEED", seed.c_str(), 1);
  unsetenv("EFFOPS_SIMT_THREADS");
}

TEST(launches_at_the_same_time) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < 20; ++round) {
        std::vector<int> out(8 * 64);
        int* at = out.data();
        const auto body = [=] {
          const int x = __shfl_xor_sync(kAllLanes, int(threadIdx.x), 1);
          at[blockIdx.x * 64 + threadIdx.x] = x + i;
        };
        wrong += simt::launch("one of several", 8, 64, 0, body) != 0;
        for (int j = 0; j < 8 * 64; ++j) wrong += out[j] != (j % 64 ^ 1) + i;
      }
    });
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0, wrong);
}

}  // namespace
}  // namespace effops::test
