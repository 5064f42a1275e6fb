// Between the 16-bit storage types and float. Narrowing rounds to nearest even.
#pragma once

#include <bit>

#include "common/dtype.h"
#include "primitives/platform.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace effops::device {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
__device__ inline float widen(f16 x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return simt::widen_f16(x.bits);
#endif
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  __device__ static float of(float x) { return x; }
};
template <>
struct Narrow<double> {
  __device__ static double of(double x) { return x; }
};
template <>
struct Narrow<bf16> {
  __device__ static bf16 of(float x) {
#ifdef __CUDACC__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    return {simt::narrow_bf16(x)};
#endif
  }
};
template <>
struct Narrow<f16> {
  __device__ static f16 of(float x) {
#ifdef __CUDACC__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    return {simt::narrow_f16(x)};
#endif
  }
};

template <class T, class C>
__device__ T narrow(C x) {
  return Narrow<T>::of(x);
}

// Two neighbours in one register, the lower address in the lower half.
template <class T>
__device__ uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
#else
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
#endif
}

}  // namespace effops::device
