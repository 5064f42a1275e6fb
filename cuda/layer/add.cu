// y += x, rounded once.
#include "layer/layer.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kThreads = 256;

template <class T, int kCount>
__global__ void add_elements(AddProblem p) {
  const T* const x = reinterpret_cast<const T*>(p.x);
  T* const y = reinterpret_cast<T*>(p.y);
  const int64_t step = int64_t(gridDim.x) * kThreads * kCount;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount; i < p.count; i += step) {
    const auto more = Items<T, kCount>::load_some(x + i, p.count - i, true);
    auto sums = Items<T, kCount>::load_some(y + i, p.count - i, true);
    EFFOPS_UNROLL
    for (int e = 0; e < kCount; ++e) sums.item[e] = narrow<T>(widen(sums.item[e]) + widen(more.item[e]));
    sums.store_some(y + i, p.count - i, true);
  }
}

template <class T, int kCount>
int start(const AddProblem& p, void* stream) {
  return launch<AddProblem>(
      {"add", stride_grid((p.count + kThreads * kCount - 1) / (kThreads * kCount)), kThreads, 0, stream},
      &add_elements<T, kCount>, p);
}

}  // namespace

int add(const AddProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = in_pieces(p.x, sizeof(T), {}) && in_pieces(p.y, sizeof(T), {});
    return pieces ? start<T, kItems16<T>>(p, stream) : start<T, 1>(p, stream);
  });
}

}  // namespace effops::device
