// Marks what kernels on a GPU share with the host.
#pragma once

#ifdef __CUDACC__
#define EFFOPS_HD __host__ __device__
#else
#define EFFOPS_HD
#endif

namespace effops {

// std's own are not device functions.
template <class T>
EFFOPS_HD constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
EFFOPS_HD constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
EFFOPS_HD constexpr T clamp_to(T x, T low, T high) {
  return x < low ? low : high < x ? high : x;
}

}  // namespace effops
