// Blocks that meet in global memory: nothing orders them within a launch.
#include "planted.h"

namespace effops::test {
namespace {

TEST(two_blocks_write_one_element) {
  Global<float> out(64);
  const Extents extents({{"out", out.get(), 256, true}});
  float* at = out.get();
  check_caught({2, 32},
               {"race: write of 4 bytes at offset ", " of 'out', which block ", " has accessed in the same launch"},
               [=](bool bug) { return [=] { at[blockIdx.x * (bug ? 31 : 32) + threadIdx.x] = 1; }; });
}

TEST(a_block_reads_what_another_writes) {
  Global<float> sums(2), out(2);
  const Extents extents({{"sums", sums.get(), 8, true}, {"out", out.get(), 8, true}});
  float *at = sums.get(), *to = out.get();
  check_caught({2, 1}, {"race: ", " of 'sums', which block "}, [=](bool bug) {
    return [=] {
      at[blockIdx.x] = 1;
      to[blockIdx.x] = at[bug ? 1 - blockIdx.x : blockIdx.x];
    };
  });
}

// Of a launch, and not of the one before.
TEST(launches_are_ordered) {
  Global<int> out(32);
  const Extents extents({{"out", out.get(), 128, true}});
  int* at = out.get();
  for (int i = 0; i < 3; ++i) run({32, 1}, [=] { at[(blockIdx.x + i) % 32] += 1; });
  for (int i = 0; i < 32; ++i) CHECK(out[i] == 3, i, ": ", out[i]);
}

// Neighbouring bytes are no race, and atomic operations by several blocks are none.
TEST(blocks_that_share_without_a_race) {
  Global<char> flags(64);
  Global<int> count(1);
  const Extents extents({{"flags", flags.get(), 64, true}, {"count", count.get(), 4, true}});
  char* at = flags.get();
  int* n = count.get();
  in_several_orders([=](const char*) {
    run({64, 32}, [=] {
      if (threadIdx.x == 0) at[blockIdx.x] = 1;
      atomicAdd(n, 1);
    });
  });
  CHECK(count[0] == 5 * 64 * 32, count[0]);
}

// The last block to come reads the results of all.
TEST(blocks_that_an_atomic_counter_orders) {
  Global<float> parts(16), sum(1);
  Global<unsigned> done(1);
  const Extents extents({{"parts", parts.get(), 64, true}, {"sum", sum.get(), 4, true}, {"done", done.get(), 4, true}});
  float *part = parts.get(), *to = sum.get();
  unsigned* counter = done.get();
  in_several_orders([&](const char*) {
    done[0] = 0;
    run({16, 1}, [=] {
      part[blockIdx.x] = float(blockIdx.x);
      __threadfence();
      if (atomicAdd(counter, 1u) != 15) return;
      float total = 0;
      for (int i = 0; i < 16; ++i) total += part[i];
      *to = total;
    });
    CHECK(sum[0] == 120, sum[0]);
  });
}

}  // namespace
}  // namespace effops::test
