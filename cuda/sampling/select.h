// Where a prefix of the descending order ends, without sorting: a weighted selection by radix on the bits of the
// values. Masses are integers, so that the sums do not depend on the order of additions.
#pragma once

#include <bit>
#include <type_traits>

#include "common/host_device.h"
#include "primitives/reduce.h"

namespace effops::device {

using Mass = unsigned long long;

template <class C>
using OrderBits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;

// Unsigned integers in the order of the values; both zeros are one. And back.
template <class C>
__device__ OrderBits<C> order_bits(C x) {
  using U = OrderBits<C>;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  const U u = std::bit_cast<U>(x + C(0));
  return u & sign ? ~u : u | sign;
}
template <class C>
__device__ C value_of(OrderBits<C> order) {
  using U = OrderBits<C>;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  return std::bit_cast<C>(order & sign ? order ^ sign : ~order);
}

template <class C>
struct Edge {  // of a prefix: all above `at`, and of those equal to it the first that have this mass in all
  OrderBits<C> at;
  Mass equals;
};

// One digit's sums. Lanes add to different copies, for logits crowd into few digits.
class Histogram {
 public:
  static constexpr int kDigits = 256, kCopies = 4;
  static constexpr int kSharedBytes = (kDigits * kCopies + 3) * sizeof(Mass);

  __device__ explicit Histogram(char* shared)
      : bins_(reinterpret_cast<Mass*>(shared)), found_(bins_ + kDigits * kCopies) {}

  __device__ void clear() {
    for (int i = threadIdx.x; i < kDigits * kCopies; i += blockDim.x) bins_[i] = 0;
    __syncthreads();
  }
  __device__ void add(int digit, Mass mass) { atomicAdd(&bins_[digit * kCopies + threadIdx.x % kCopies], mass); }

  // The digit at which the sum from the highest one down, begun with `above`, reaches `enough`; else the lowest that
  // has a mass. `above` becomes the sum of those higher, `inside` the digit's own.
  __device__ int find(Mass enough, Mass& above, Mass& inside) {
    __syncthreads();
    if (warp_index() == 0) look(enough, above);
    __syncthreads();
    above = found_[1];
    inside = found_[2];
    return static_cast<int>(found_[0]);
  }

 private:
  static constexpr int kOwn = kDigits / kWarp;  // digits a lane

  __device__ Mass sum_of(int digit) const {
    Mass sum = 0;
    for (int c = 0; c < kCopies; ++c) sum += bins_[digit * kCopies + c];
    return sum;
  }

  __device__ void look(Mass enough, Mass above) {
    const int lane = lane_index(), first = kDigits - 1 - lane * kOwn;
    Mass own = 0;
    for (int i = 0; i < kOwn; ++i) own += sum_of(first - i);
    Mass reached = own;  // with the lanes of higher digits
    for (int step = 1; step < kWarp; step *= 2) {
      const Mass higher = __shfl_up_sync(kAllLanes, reached, step);
      if (lane >= step) reached += higher;
    }
    const unsigned have = __ballot_sync(kAllLanes, own > 0);
    const unsigned enough_here = __ballot_sync(kAllLanes, own > 0 && above + reached >= enough);
    const int chosen = enough_here ? __ffs(enough_here) - 1 : have ? 31 - __clz(have) : 0;
    if (lane != chosen) return;
    Mass sum = above + reached - own;
    found_[0] = first;
    found_[1] = sum;
    found_[2] = 0;
    for (int i = 0; i < kOwn && (i == 0 || sum < enough); ++i) {
      const Mass inside = sum_of(first - i);
      if (inside == 0) continue;
      found_[0] = first - i;
      found_[1] = sum;
      found_[2] = inside;
      sum += inside;
    }
  }

  Mass *bins_, *found_;
};

// The edge of the smallest prefix whose masses add up to `enough`; where they do not, of all that have a mass.
// each(take) has the threads of the block call take(value, mass) for all values.
template <class C, class Each>
__device__ Edge<C> find_edge(Mass enough, Histogram histogram, Each&& each) {
  using U = OrderBits<C>;
  constexpr int kDigitBits = 8;
  U at = 0;
  Mass above = 0, inside = 0;
  for (int shift = 8 * sizeof(U) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    histogram.clear();
    const U known = shift + kDigitBits < 8 * int(sizeof(U)) ? ~U(0) << (shift + kDigitBits) : 0;
    each([&](C value, Mass mass) {
      const U order = order_bits(value);
      if (mass > 0 && (order & known) == at) histogram.add(static_cast<int>(order >> shift & 255), mass);
    });
    at |= U(histogram.find(enough, above, inside)) << shift;
  }
  return {at, min_of(inside, enough > above ? enough - above : 0)};
}

}  // namespace effops::device
