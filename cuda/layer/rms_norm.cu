// y = x / rms(x) * (weight + offset): a block a row. The order of additions does not depend on how the row lies.
#include "layer/layer.h"
#include "primitives/element.h"
#include "primitives/reduce.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 512;

struct Params {
  RmsNormProblem p;
  bool pieces;
};

template <class T>
__global__ void __launch_bounds__(kMostThreads) rms_norm_rows(Params a) {
  using C = Compute<T>;
  constexpr int kCount = kItems16<T>;
  using Own = Items<T, kCount>;
  const RmsNormProblem& p = a.p;
  const T* const weight = reinterpret_cast<const T*>(p.weight);
  const C offset = static_cast<C>(p.weight_offset);
  const int64_t begin = threadIdx.x * kCount, step = blockDim.x * kCount;
  for (int64_t row = blockIdx.x; row < p.rows.rows(); row += gridDim.x) {
    const T* const x = reinterpret_cast<const T*>(p.x) + p.rows.offset(row);
    T* const y = reinterpret_cast<T*>(p.y) + row * p.dim;
    C sum = 0;
    for (int64_t d = begin; d < p.dim; d += step) {
      const Own items = Own::load_some(x + d, p.dim - d, a.pieces);
      EFFOPS_UNROLL
      for (int i = 0; i < kCount; ++i) sum += widen(items.item[i]) * widen(items.item[i]);
    }
    sum = reduce_block(sum, Sum(), C(0), reinterpret_cast<C*>(shared_memory()));
    const C factor = C(1) / square_root(sum / static_cast<C>(p.dim) + static_cast<C>(p.eps));
    for (int64_t d = begin; d < p.dim; d += step) {
      Own items = Own::load_some(x + d, p.dim - d, a.pieces);
      const Own weights = Own::load_some(weight + d, p.dim - d, a.pieces);
      EFFOPS_UNROLL
      for (int i = 0; i < kCount; ++i)
        items.item[i] = narrow<T>(widen(items.item[i]) * factor * (widen(weights.item[i]) + offset));
      items.store_some(y + d, p.dim - d, a.pieces);
    }
  }
}

}  // namespace

int rms_norm(const RmsNormProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t item = sizeof(T);
    const bool pieces = in_pieces(p.x, item, {p.dim, p.rows.stride[0], p.rows.stride[1], p.rows.stride[2]}) &&
                        in_pieces(p.weight, item, {}) && in_pieces(p.y, item, {});
    const int threads = threads_for((p.dim + kItems16<T> - 1) / kItems16<T>, kMostThreads);
    return launch<Params>({"rms_norm", stride_grid(p.rows.rows()), threads, kWarp * 8, stream}, &rms_norm_rows<T>,
                          Params{p, pieces});
  });
}

}  // namespace effops::device
