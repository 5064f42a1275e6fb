// Planted hazards in shared memory.
#include "planted.h"
#include "primitives/barrier.h"
#include "primitives/copy_async.h"
#include "primitives/ldmatrix.h"
#include "primitives/vector.h"

namespace effops::test {
namespace {

using namespace device;

__device__ float* floats() { return reinterpret_cast<float*>(shared_memory()); }

TEST(missing_barrier_before_a_read) {
  Global<float> out(128);
  float* at = out.get();
  check_caught({4, 128, 512}, {"shared memory", "test_races.cpp"}, [=](bool bug) {
    return [=] {
      floats()[threadIdx.x] = float(threadIdx.x);
      if (!bug) __syncthreads();
      at[threadIdx.x] = floats()[(threadIdx.x + 32) % 128];
    };
  });
}

// The value is right in the usual order. Only the second round's write can be wrong.
TEST(missing_barrier_before_a_write) {
  Global<float> out(128);
  float* at = out.get();
  check_caught({1, 128, 512}, {"race: ", "by thread ", "no barrier between", "test_races.cpp"}, [=](bool bug) {
    return [=] {
      float sum = 0;
      for (int round = 0; round < 2; ++round) {
        floats()[threadIdx.x] = float(round);
        __syncthreads();
        sum += floats()[(threadIdx.x + 32) % 128];
        if (!bug) __syncthreads();
      }
      at[threadIdx.x] = sum;
    };
  });
}

TEST(missing_syncwarp) {
  Global<float> out(64);
  float* at = out.get();
  check_caught({1, 64, 256}, {"shared memory"}, [=](bool bug) {
    return [=] {
      for (int round = 0; round < 2; ++round) {
        floats()[threadIdx.x] = float(round);
        if (!bug) __syncwarp();
        at[threadIdx.x] = floats()[threadIdx.x ^ 1];
        __syncwarp();
      }
    };
  });
}

TEST(missing_syncwarp_before_a_write) {
  Global<float> out(32);
  float* at = out.get();
  check_caught({1, 32, 128}, {"race: ", "no __syncwarp or barrier between"}, [=](bool bug) {
    return [=] {
      for (int round = 0; round < 2; ++round) {
        floats()[threadIdx.x] = float(round);
        __syncwarp();
        at[threadIdx.x] = floats()[threadIdx.x ^ 1];
        if (!bug) __syncwarp();
      }
    };
  });
}

// A shuffle lets lanes meet and orders no memory.
TEST(shuffle_in_place_of_a_syncwarp) {
  check_caught({1, 32, 128}, {"race: ", "__syncwarp"}, [](bool bug) {
    return [=] {
      floats()[threadIdx.x] = 1;
      if (bug) __shfl_sync(kAllLanes, 1, 0);
      else __syncwarp();
      use(floats()[31 - threadIdx.x]);
    };
  });
}

TEST(syncwarp_of_too_few_lanes) {
  check_caught({1, 32, 128}, {"shared memory"}, [](bool bug) {
    return [=] {
      const int lane = lane_index(), first = lane / 16 * 16;
      floats()[lane] = 1;
      __syncwarp(0xffffu << first);
      if (lane % 16 == 0) floats()[lane] = 2;
      __syncwarp(0xffffu << first);
      const float x = floats()[bug ? lane ^ 16 : lane ^ 1];
      __syncwarp();
      floats()[lane] = x;
    };
  });
}

TEST(two_writers) {
  check_caught({1, 64, 256}, {"race: write", "and a write by thread "},
               [](bool bug) { return [=] { floats()[bug ? threadIdx.x % 32 : threadIdx.x] = 1; }; });
}

TEST(plain_access_next_to_an_atomic_one) {
  check_caught({1, 64, 4}, {"race: "}, [](bool bug) {
    return [=] {
      int* count = reinterpret_cast<int*>(shared_memory());
      if (threadIdx.x == 0) *count = 0;
      __syncthreads();
      atomicAdd(count, 1);
      if (!bug) __syncthreads();
      use(*count);
    };
  });
}

TEST(barrier_of_the_wrong_warps) {
  check_caught({1, 128, 512}, {"shared memory"}, [](bool bug) {
    return [=] {
      const int pair = warp_index() / 2;
      floats()[threadIdx.x] = 1;
      named_barrier_sync(1 + (bug ? warp_index() % 2 : pair), 64);
      use(floats()[threadIdx.x ^ 32]);
    };
  });
}

// The producer goes on while others still read what it had made.
TEST(missing_wait_for_consumers) {
  check_caught({1, 64, 128}, {"race: "}, [](bool bug) {
    return [=] {
      for (int i = 0; i < 2; ++i) {
        if (warp_index() == 0) {
          floats()[lane_index()] = float(i);
          named_barrier_arrive(1 + i, 64);
          if (!bug) named_barrier_sync(3, 64);
        } else {
          named_barrier_sync(1 + i, 64);
          use(floats()[31 - lane_index()]);
          if (!bug) named_barrier_arrive(3, 64);
        }
      }
    };
  });
}

TEST(missing_wait) {
  Global<float> from(8 * 32, 1.0f);
  float* source = from.get();
  check_caught({1, 32, 1024}, {"read of 4 bytes", "before wait_group", "cp.async of thread "}, [=](bool bug) {
    return [=] {
      for (int stage = 0; stage < 2; ++stage) {
        const int place = 4 * (lane_index() + 32 * stage);
        copy_async(floats() + place, source + place, 16);
        copy_commit();
      }
      bug ? copy_wait<2>() : copy_wait<1>();
      __syncwarp();
      use(floats()[4 * lane_index()]);
      copy_wait<0>();
    };
  });
}

// The wait is there, but others than the copying thread read at once.
TEST(missing_barrier_after_a_wait) {
  Global<float> from(4 * 64, 1.0f), out(64);
  float *source = from.get(), *at = out.get();
  check_caught({1, 64, 1024}, {"shared memory"}, [=](bool bug) {
    return [=] {
      copy_async(floats() + 4 * threadIdx.x, source + 4 * threadIdx.x, 16);
      copy_commit();
      if (bug) __syncthreads();
      copy_wait<0>();
      if (!bug) __syncthreads();
      at[threadIdx.x] = floats()[4 * (threadIdx.x ^ 32)];
    };
  });
}

TEST(copy_over_what_others_read) {
  Global<float> from(4 * 64, 1.0f);
  float* source = from.get();
  check_caught({1, 64, 1024}, {"race: ", "copy_async.h"}, [=](bool bug) {
    return [=] {
      for (int i = 0; i < 2; ++i) {
        copy_async(floats() + 4 * threadIdx.x, source + 4 * threadIdx.x, 16);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        use(floats()[4 * (threadIdx.x ^ 32)]);
        if (!bug) __syncthreads();
      }
    };
  });
}

TEST(copy_never_waited_for) {
  Global<float> from(4, 1.0f);
  float* source = from.get();
  check_caught({1, 1, 16}, {"without having waited for this cp.async"}, [=](bool bug) {
    return [=] {
      copy_async(floats(), source, 16);
      copy_commit();
      if (!bug) copy_wait<0>();
    };
  });
}

TEST(uninitialised_read) {
  Global<float> out(32);
  float* at = out.get();
  check_caught({2, 32, 128}, {"read of 4 uninitialised bytes at offset 124"}, [=](bool bug) {
    return [=] {
      if (!bug || lane_index() < 31) floats()[lane_index()] = 1;
      __syncwarp();
      if (lane_index() == 0) at[0] = floats()[31];
    };
  });
}

// Of a pair of 16-bit values that ldmatrix reads one is missing.
TEST(uninitialised_row_of_ldmatrix) {
  check_caught({1, 32, 512}, {"read of 16 uninitialised bytes", "shared memory"}, [](bool bug) {
    return [=] {
      uint16_t* halves = reinterpret_cast<uint16_t*>(shared_memory());
      for (int i = lane_index(); i < 256; i += 32)
        if (!bug || i != 77) halves[i] = 0;
      __syncwarp();
      const void* rows[1] = {shared_memory() + 16 * lane_index()};
      uint32_t to[1][4];
      ldmatrix_x4(to, rows);
    };
  });
}

// Neighbouring bytes and halves of one chunk by different threads are no race, whatever the sizes before.
TEST(neighbours_do_not_race) {
  in_several_orders([](const char*) {
    run({1, 64, 1024}, [] {
      char* bytes = shared_memory();
      store16(bytes + 16 * threadIdx.x, {});
      __syncthreads();
      bytes[threadIdx.x] = 1;
      reinterpret_cast<uint16_t*>(bytes + 256)[threadIdx.x] = 1;
      floats()[128 + threadIdx.x] = 1;
      __syncthreads();
      use(load16(bytes + 16 * (63 - threadIdx.x)));
      __syncthreads();
      store16(bytes + 16 * threadIdx.x, {});
    });
  });
}

}  // namespace
}  // namespace effops::test
