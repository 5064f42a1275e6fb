// Joins partial attention results by their log-sum-exp. Memory-bound: each element is read once. A warp a row.
#include "attention/merge_states.h"

#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

template <class T, int kCount>
__global__ void merge_rows(MergeProblem p) {
  using C = Compute<T>;
  const C* const lses = reinterpret_cast<const C*>(p.lses);
  const T* const outs = reinterpret_cast<const T*>(p.outs);
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp_index(); row < p.rows; row += int64_t(gridDim.x) * kWarps) {
    const C empty = -static_cast<C>(INFINITY);
    C top = empty, total = 0;
    for (int64_t i = 0; i < p.parts; ++i) top = max_of(top, lses[i * p.rows + row]);
    for (int64_t i = 0; i < p.parts; ++i)
      if (lses[i * p.rows + row] > empty) total += exp_of(lses[i * p.rows + row] - top);
    const C joined = top > empty ? top + log_of(total) : empty;
    if (lane_index() == 0) reinterpret_cast<C*>(p.lse)[row] = joined;
    T* const y = reinterpret_cast<T*>(p.out) + row * p.dim;
    for (int64_t d = lane_index() * kCount; d < p.dim; d += kWarp * kCount) {
      C sum[kCount] = {};
      for (int64_t i = 0; i < p.parts; ++i) {
        const C part = lses[i * p.rows + row];
        if (!(part > empty)) continue;
        const C weight = exp_of(part - joined);
        const auto items = Items<T, kCount>::load(outs + (i * p.rows + row) * p.dim + d);
        EFFOPS_UNROLL
        for (int e = 0; e < kCount; ++e) sum[e] += weight * widen(items.item[e]);
      }
      Items<T, kCount> result;
      EFFOPS_UNROLL
      for (int e = 0; e < kCount; ++e) result.item[e] = narrow<T>(sum[e]);
      result.store(y + d);
    }
  }
}

}  // namespace

int merge_states(const MergeProblem& p, void* stream) {
  const Launch l{"merge_states", stride_grid((p.rows * kWarp + kThreads - 1) / kThreads), kThreads, 0, stream};
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool pieces = in_pieces(p.outs, sizeof(T), {p.dim}) && in_pieces(p.out, sizeof(T), {});
    return pieces ? launch<MergeProblem>(l, &merge_rows<T, kItems16<T>>, p)
                  : launch<MergeProblem>(l, &merge_rows<T, 1>, p);
  });
}

}  // namespace effops::device
