// y = silu(gate) * up of rows [gate, up].
#include "layer/layer.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 256;

template <class T, int kCount>
__global__ void silu_mul_rows(SiluMulProblem p) {
  using C = Compute<T>;
  const int64_t begin = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kCount;
  const int64_t step = int64_t(gridDim.y) * blockDim.x * kCount;
  for (int64_t row = blockIdx.x; row < p.rows.rows(); row += gridDim.x) {
    const T* const gate = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    T* const y = reinterpret_cast<T*>(p.y) + row * p.dim;
    for (int64_t d = begin; d < p.dim; d += step) {
      auto items = Items<T, kCount>::load(gate + d);
      const auto up = Items<T, kCount>::load(gate + p.dim + d);
      EFFOPS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const C g = widen(items.item[i]);
        items.item[i] = narrow<T>(g * (C(1) / (C(1) + exp_of(-g))) * widen(up.item[i]));
      }
      items.store(y + d);
    }
  }
}

template <class T, int kCount>
int start(const SiluMulProblem& p, void* stream) {
  if (p.dim == 0) return 0;
  const int64_t pieces = (p.dim + kCount - 1) / kCount;
  const int threads = threads_for(pieces, kMostThreads);
  dim3 grid = stride_grid(p.rows.rows());
  grid.y = static_cast<unsigned>(min_of<int64_t>((pieces + threads - 1) / threads, 64));
  return launch<SiluMulProblem>({"silu_mul", grid, threads, 0, stream}, &silu_mul_rows<T, kCount>, p);
}

}  // namespace

int silu_mul(const SiluMulProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t item = sizeof(T);
    const bool pieces =
        in_pieces(p.x, item, {p.dim, p.rows.stride[0], p.rows.stride[1], p.rows.stride[2]}) && in_pieces(p.y, item, {});
    return pieces ? start<T, kItems16<T>>(p, stream) : start<T, 1>(p, stream);
  });
}

}  // namespace effops::device
