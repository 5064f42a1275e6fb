// Kernels over the element types: the choice at launch, the type that they compute in, and accesses of one element or
// of 16 bytes of them.
#pragma once

#include <bit>
#include <cmath>
#include <initializer_list>

#include "common/host_device.h"
#include "primitives/convert.h"
#include "primitives/launch.h"
#include "primitives/vector.h"

namespace effops::device {

// start(T()) with the element type.
template <class F>
int with_element(DType t, F&& start) {
  switch (t) {
    case DType::f32:
      return start(float());
    case DType::bf16:
      return start(bf16());
    case DType::f16:
      return start(f16());
    case DType::f64:
      return start(double());
  }
  return kUnsupported;
}

template <class T>
using Compute = decltype(widen(T()));

template <class T>
inline constexpr int kItems16 = 16 / static_cast<int>(sizeof(T));

// kCount elements: one, or all of 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Items {
  T item[kCount];

  __device__ static Items load(const T* from) {
    if constexpr (kCount == 1) {
      return {*from};
    } else {
      return std::bit_cast<Items>(load16(from));
    }
  }
  // The first `count`, and zeros: in one piece where all are there and `piece` says that addresses are fit for it.
  __device__ static Items load_some(const T* from, int64_t count, bool piece) {
    if (piece && count >= kCount) return load(from);
    Items some;
    EFFOPS_UNROLL
    for (int i = 0; i < kCount; ++i) some.item[i] = i < count ? from[i] : T{};
    return some;
  }
  __device__ void store_some(T* to, int64_t count, bool piece) const {
    if (piece && count >= kCount) return store(to);
    EFFOPS_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (i < count) to[i] = item[i];
  }
  __device__ void store(T* to) const {
    if constexpr (kCount == 1) {
      *to = item[0];
    } else {
      store16(to, std::bit_cast<Vector16>(*this));
    }
  }
};

// Do 16-byte pieces serve: is the address aligned, and are all of these distances multiples of them?
inline bool in_pieces(const void* data, int64_t item_bytes, std::initializer_list<int64_t> distances) {
  bool good = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t d : distances) good = good && d * item_bytes % 16 == 0;
  return good;
}

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// Blocks for `count` of something, each of which goes through all of its share.
inline dim3 stride_grid(int64_t count) {
  constexpr int64_t kMost = 1 << 16;
  return dim3(static_cast<unsigned>(count < kMost ? count : kMost));
}

// Threads for `count` pieces of work: whole warps.
inline int threads_for(int64_t count, int most) {
  const int64_t warps = (count + kWarp - 1) / kWarp;
  return static_cast<int>(clamp_to<int64_t>(warps * kWarp, kWarp, most));
}

}  // namespace effops::device
