// Rows in expert order back to tokens: a weighted sum of each token's rows, choices in order.
#include "moe/moe.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 256;

__device__ inline float add_product(float a, float b, float sum) { return fmaf(a, b, sum); }
__device__ inline double add_product(double a, double b, double sum) { return fma(a, b, sum); }

template <class T, int kCount>
__global__ void unpermute_rows_of(const __grid_constant__ UnpermuteProblem p) {
  using C = Compute<T>;
  const int64_t begin = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kCount;
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kCount;
  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const int32_t* const places = p.inverse + token * p.k;
    const C* const weights = p.weights ? reinterpret_cast<const C*>(p.weights) + token * p.k : nullptr;
    T* const out = reinterpret_cast<T*>(p.out) + token * p.dim;
    for (int64_t d = begin; d < p.dim; d += step) {
      C sum[kCount] = {};
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t place = places[j];
        if (place < 0 || place >= p.slots) continue;
        const C weight = weights ? weights[j] : C(1);
        const auto items = Items<T, kCount>::load(reinterpret_cast<const T*>(p.y) + place * p.y_row + d);
        EFFOPS_UNROLL
        for (int i = 0; i < kCount; ++i) sum[i] = add_product(weight, widen(items.item[i]), sum[i]);
      }
      Items<T, kCount> items;
      EFFOPS_UNROLL
      for (int i = 0; i < kCount; ++i) items.item[i] = narrow<T>(sum[i]);
      items.store(out + d);
    }
  }
}

template <class T, int kCount>
int start(const UnpermuteProblem& p, void* stream) {
  if (p.dim == 0) return 0;
  const int64_t pieces = (p.dim + kCount - 1) / kCount;
  const int threads = threads_for(pieces, kMostThreads);
  dim3 grid = stride_grid(p.tokens);
  grid.y = static_cast<unsigned>(min_of<int64_t>((pieces + threads - 1) / threads, 64));
  return launch<UnpermuteProblem>({"unpermute_rows", grid, threads, 0, stream}, &unpermute_rows_of<T, kCount>, p);
}

}  // namespace

int unpermute_rows(const UnpermuteProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = in_pieces(p.y, sizeof(T), {p.dim, p.y_row}) && in_pieces(p.out, sizeof(T), {});
    return pieces ? start<T, kItems16<T>>(p, stream) : start<T, 1>(p, stream);
  });
}

}  // namespace effops::device
