// Shuffles, votes and reductions, against what CUDA's documentation says of each lane.
#include "primitives/reduce.h"
#include "run.h"

namespace effops::test {
namespace {

using namespace device;

template <class T, class Shuffle, class Source>
void check_shuffle(Shuffle shuffle, Source source) {
  for (int width : {1, 2, 4, 8, 16, 32})
    for (int argument = 0; argument < 32; ++argument) {
      Global<T> out(32);
      T* at = out.get();
      run({1, 32}, [=] { at[lane_index()] = shuffle(T(lane_index() * 3 + 1), argument, width); });
      for (int lane = 0; lane < 32; ++lane) {
        const int segment = lane / width * width, from = source(lane, argument, width);
        const T expected = T((from >= segment && from < segment + width ? from : lane) * 3 + 1);
        CHECK(out[lane] == expected, width, " ", argument, " ", lane);
      }
    }
}

template <class T>
void check_shuffles() {
  check_shuffle<T>([](T x, int a, int w) { return __shfl_sync(kAllLanes, x, a, w); },
                   [](int lane, int a, int w) { return lane / w * w + a % w; });
  check_shuffle<T>([](T x, int a, int w) { return __shfl_up_sync(kAllLanes, x, a, w); },
                   [](int lane, int a, int) { return lane - a; });
  check_shuffle<T>([](T x, int a, int w) { return __shfl_down_sync(kAllLanes, x, a, w); },
                   [](int lane, int a, int) { return lane + a; });
}

TEST(shuffles) {
  check_shuffles<int>();
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<int64_t>();
}

// The partner may lie in an earlier segment, not in a later one.
TEST(shuffle_xor) {
  for (int width : {8, 32})
    for (int bits = 0; bits < 32; ++bits) {
      Global<int> out(32);
      int* at = out.get();
      run({1, 32}, [=] { at[lane_index()] = __shfl_xor_sync(kAllLanes, lane_index(), bits, width); });
      for (int lane = 0; lane < 32; ++lane) {
        const int from = lane ^ bits, end = lane / width * width + width;
        CHECK(out[lane] == (from < end ? from : lane), width, " ", bits, " ", lane);
      }
    }
}

TEST(parts_of_a_warp_meet_on_their_own) {
  Global<int> out(32);
  int* at = out.get();
  run({1, 32}, [=] {
    const unsigned mask = lane_index() < 12 ? 0xfffu : ~0xfffu;
    int sum = 0;
    for (int i = 0; i < (lane_index() < 12 ? 3 : 7); ++i)
      sum += __shfl_sync(mask, lane_index(), lane_index() < 12 ? i : 31);
    at[lane_index()] = sum;
  });
  for (int lane = 0; lane < 32; ++lane) CHECK(out[lane] == (lane < 12 ? 3 : 217), lane, ": ", out[lane]);
}

TEST(votes) {
  Global<unsigned> out(5 * 40);
  unsigned* at = out.get();
  run({1, 40}, [=] {
    const int t = threadIdx.x;
    at[t * 5] = __ballot_sync(kAllLanes, t % 3 == 0);
    at[t * 5 + 1] = __any_sync(kAllLanes, t == 35);
    at[t * 5 + 2] = __all_sync(kAllLanes, t != 5);
    at[t * 5 + 3] = __all_sync(kAllLanes, 1);
    at[t * 5 + 4] = __any_sync(kAllLanes, 0);
  });
  for (int t = 0; t < 40; ++t) {
    unsigned ballot = 0;
    for (int u = t / 32 * 32; u < std::min(40, t / 32 * 32 + 32); ++u) ballot |= unsigned(u % 3 == 0) << u % 32;
    const unsigned* v = out.get() + t * 5;
    CHECK(v[0] == ballot && v[1] == (t >= 32) && v[2] == (t >= 32) && v[3] == 1 && v[4] == 0, t, ": ", v[0]);
  }
}

template <int kLanes>
void check_reduce_lanes() {
  Global<float> out(32);
  float* at = out.get();
  run({1, 32}, [=] { at[lane_index()] = reduce_lanes<kLanes>(float(lane_index()), Sum()); });
  for (int lane = 0; lane < 32; ++lane) {
    const int first = lane / kLanes * kLanes;
    CHECK(out[lane] == kLanes * first + kLanes * (kLanes - 1) / 2, kLanes, " ", lane);
  }
}

TEST(reduce_lanes) {
  check_reduce_lanes<1>();
  check_reduce_lanes<2>();
  check_reduce_lanes<4>();
  check_reduce_lanes<8>();
  check_reduce_lanes<16>();
  check_reduce_lanes<32>();
}

TEST(reduce_blocks) {
  for (int threads = 32; threads <= 1024; threads += 32) {
    Global<double> out(2 * threads);
    double* at = out.get();
    run({1, threads, 32 * 8}, [=] {
      double* scratch = reinterpret_cast<double*>(shared_memory());
      const double t = threadIdx.x;
      at[threadIdx.x] = reduce_block(t, Sum(), 0.0, scratch);
      at[blockDim.x + threadIdx.x] = reduce_block(t * ((int(threadIdx.x) * 7) % 5), Max(), -1.0, scratch);
    });
    double top = 0;
    for (int t = 0; t < threads; ++t) top = std::max(top, double(t) * (t * 7 % 5));
    for (int t = 0; t < threads; ++t)
      CHECK(out[t] == threads * (threads - 1) / 2 && out[threads + t] == top, threads, " ", t);
  }
}

}  // namespace
}  // namespace effops::test
