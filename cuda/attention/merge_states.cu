// Joins partial attention results by their log-sum-exp. Memory-bound: each element is read once. A warp a row.
#include "attention/merge_states.h"

#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128;

template <class T, class O, int kCount>
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
    O* const y = reinterpret_cast<O*>(p.out) + row * p.dim;
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
      if constexpr (sizeof(O) == sizeof(T)) {
        Items<O, kCount> result;
        EFFOPS_UNROLL
        for (int e = 0; e < kCount; ++e) result.item[e] = narrow<O>(sum[e]);
        result.store(y + d);
      } else {
        EFFOPS_UNROLL
        for (int e = 0; e < kCount; ++e) y[d + e] = narrow<O>(sum[e]);
      }
    }
  }
}

template <class T, class O>
int merge(const MergeProblem& p, void* stream) {
  const Launch l{"merge_states", stride_grid((p.rows * kWarp + kThreads - 1) / kThreads), kThreads, 0, stream};
  const bool pieces = in_pieces(p.outs, sizeof(T), {p.dim}) && in_pieces(p.out, sizeof(T), {});
  return pieces ? launch<MergeProblem>(l, &merge_rows<T, O, kItems16<T>>, p)
                : launch<MergeProblem>(l, &merge_rows<T, O, 1>, p);
}

}  // namespace

int merge_states(const MergeProblem& p, void* stream) {
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      if (p.out_dtype == DType::bf16) return merge<T, bf16>(p, stream);
      if (p.out_dtype == DType::f16) return merge<T, f16>(p, stream);
    }
    return merge<T, T>(p, stream);
  });
}

}  // namespace effops::device
