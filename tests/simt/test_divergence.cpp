// Planted barriers and warp operations at which not all arrive.
#include "planted.h"
#include "primitives/barrier.h"
#include "primitives/ldmatrix.h"
#include "primitives/mma.h"

namespace effops::test {
namespace {

using namespace device;

TEST(early_exit_before_a_barrier) {
  check_caught({3, 128}, {"__syncthreads (", "test_divergence.cpp"}, [](bool bug) {
    return [=] {
      if (bug && blockIdx.x == 1 && threadIdx.x == 77) return;
      __syncthreads();
    };
  });
}

TEST(half_block_barrier) {
  check_caught({1, 128}, {"__syncthreads"}, [](bool bug) {
    return [=] {
      if (!bug || threadIdx.x < 64) __syncthreads();
      __syncwarp();
    };
  });
}

TEST(halves_at_different_barriers) {
  check_caught({1, 128}, {"barrier divergence: __syncthreads (", "wait at another"}, [](bool bug) {
    return [=] {
      if (bug) {
        if (threadIdx.x < 64) __syncthreads();
        else __syncthreads();
      } else {
        __syncthreads();
      }
    };
  });
}

TEST(named_barrier_that_too_few_reach) {
  check_caught({1, 96}, {"barrier divergence: 64 of 96 threads wait at a named barrier, 32 have exited"}, [](bool bug) {
    return [=] {
      if (warp_index() == 2) return;
      named_barrier_sync(3, bug ? 96 : 64);
    };
  });
}

TEST(named_barrier_of_two_counts) {
  check_caught({1, 64}, {"others meet there as"},
               [](bool bug) { return [=] { named_barrier_sync(3, bug && warp_index() ? 96 : 64); }; });
}

TEST(warp_that_arrives_twice) {
  check_caught({1, 96}, {"named barrier"}, [](bool bug) {
    return [=] {
      for (int i = 0; i < 2; ++i) {
        if (warp_index() < 2) named_barrier_arrive(bug ? 5 : 5 + i, 96);
        else named_barrier_sync(5 + i, 96);
      }
    };
  });
}

TEST(missing_lane) {
  check_caught({1, 32}, {"__shfl_xor_sync", "lane"}, [](bool bug) {
    return [=] {
      if (!bug || lane_index() != 13) __shfl_xor_sync(kAllLanes, 1, 1);
      __syncthreads();
    };
  });
}

TEST(exited_lane) {
  check_caught({1, 32}, {"__syncwarp", "exit"}, [](bool bug) {
    return [=] {
      if (bug && lane_index() == 13) return;
      __syncwarp();
    };
  });
}

TEST(lane_outside_of_its_mask) {
  check_caught({1, 32}, {"__ballot_sync: its own lane is not in the mask 0x0000ffff"},
               [](bool bug) { return [=] { __ballot_sync(bug ? 0xffffu : kAllLanes, 1); }; });
}

TEST(shuffle_from_outside_of_the_mask) {
  check_caught({1, 32}, {"shuffle from lane 16, which is not in the mask 0x0000ffff"}, [](bool bug) {
    return [=] {
      if (lane_index() < 16) __shfl_down_sync(0xffffu, 1, 1, bug ? 32 : 16);
    };
  });
}

TEST(shuffle_from_a_lane_that_is_not) {
  check_caught({1, 40}, {"shuffle from lane"},
               [](bool bug) { return [=] { __shfl_xor_sync(kAllLanes, 1, bug ? 8 : 4); }; });
}

TEST(unequal_operations) {
  check_caught({1, 32}, {"unequal operations of one warp: ", "__syncwarp", "__any_sync"}, [](bool bug) {
    return [=] {
      if (bug && lane_index() > 20) __any_sync(kAllLanes, 1);
      else __syncwarp();
    };
  });
}

TEST(unequal_sizes_of_an_mma_row) {
  check_caught({1, 32}, {"unequal operations of one warp: mma"}, [](bool bug) {
    return [=] {
      uint32_t a[4] = {}, b[2][2] = {};
      float d[2][4] = {}, one[1][4] = {};
      const uint32_t of_one[1][2] = {};
      if (bug && lane_index() == 5) mma_row<bf16>(one, a, of_one);
      else mma_row<bf16>(d, a, b);
    };
  });
}

TEST(mma_of_a_part_of_a_warp) {
  const auto kernel = [] {
    const uint32_t a[4] = {}, b[1][2] = {};
    float d[1][4] = {};
    mma_row<bf16>(d, a, b);
  };
  const std::string text = report_of({1, 48}, kernel);
  CHECK(text.find("mma needs all 32 lanes of a warp, and this one has 16") != std::string::npos, text);
}

TEST(unequal_loop_counts) {
  check_caught({1, 32}, {"__shfl_sync"}, [](bool bug) {
    return [=] {
      const int rounds = bug ? 3 + lane_index() / 16 : 4;
      for (int i = 0; i < rounds; ++i) __shfl_sync(kAllLanes, i, 0);
    };
  });
}

// The first block of several that fail is the one that is told, on any number of threads.
TEST(first_failure_is_told) {
  for (const char* threads : {"1", "4"}) {
    setenv("EFFOPS_SIMT_THREADS", threads, 1);
    for (int i = 0; i < 20; ++i) {
      const std::string text = report_of({40, 64}, [] {
        if (blockIdx.x % 7 == 5 && threadIdx.x >= 32) return;
        __syncthreads();
      });
      CHECK(text.find("block (5, 0, 0)") != std::string::npos, text);
    }
  }
  unsetenv("EFFOPS_SIMT_THREADS");
}

}  // namespace
}  // namespace effops::test
