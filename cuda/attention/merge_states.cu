// Joins partial attention results by their log-sum-exp. Memory-bound: each element is read once.
#include "attention/merge_states.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kThreads = 128;

template <class C>
__device__ C minus_infinity() {
  return -static_cast<C>(INFINITY);
}

template <class C, class T>
__device__ C widen(T x) {
  return static_cast<C>(x);
}

template <class T, class C>
__device__ T narrow(C x) {
  return static_cast<T>(x);
}

// One warp a row; grid-stride over rows.
template <class T, class C>
__global__ void merge_states(int64_t parts, int64_t rows, int64_t dim, const T* outs, const C* lses, T* out, C* lse) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32; row < rows; row += warps) {
    C top = minus_infinity<C>(), total = 0;
    for (int64_t i = 0; i < parts; ++i) top = max(top, lses[i * rows + row]);
    for (int64_t i = 0; i < parts; ++i)
      if (lses[i * rows + row] > minus_infinity<C>()) total += exp(lses[i * rows + row] - top);
    const C joined = top > minus_infinity<C>() ? top + log(total) : minus_infinity<C>();
    if (lane == 0) lse[row] = joined;
    for (int64_t d = lane; d < dim; d += 32) {
      C sum = 0;
      for (int64_t i = 0; i < parts; ++i) {
        const C part = lses[i * rows + row];
        if (part > minus_infinity<C>()) sum += exp(part - joined) * widen<C>(outs[(i * rows + row) * dim + d]);
      }
      out[row * dim + d] = narrow<T>(sum);
    }
  }
}

template <class T, class C>
int launch(int64_t parts, int64_t rows, int64_t dim, const void* outs, const void* lses, void* out, void* lse,
           void* stream) {
  if (rows == 0) return cudaSuccess;
  const int64_t wanted = (rows * 32 + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 65535 ? wanted : 65535);
  merge_states<T, C><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      parts, rows, dim, static_cast<const T*>(outs), static_cast<const C*>(lses), static_cast<T*>(out),
      static_cast<C*>(lse));
  return cudaGetLastError();
}

}  // namespace

extern "C" int effops_cuda_merge_states(int dtype, int64_t parts, int64_t rows, int64_t dim, const void* outs,
                                        const void* lses, void* out, void* lse, void* stream) {
  switch (dtype) {
    case 0:
      return launch<float, float>(parts, rows, dim, outs, lses, out, lse, stream);
    case 1:
      return launch<__nv_bfloat16, float>(parts, rows, dim, outs, lses, out, lse, stream);
    case 2:
      return launch<__half, float>(parts, rows, dim, outs, lses, out, lse, stream);
    case 3:
      return launch<double, double>(parts, rows, dim, outs, lses, out, lse, stream);
  }
  return cudaErrorInvalidValue;
}
