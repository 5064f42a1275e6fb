// dQ in float32 of sixteen rows of a KV head.
#pragma once

#include "attention/backward_scalar.h"
#include "attention/mask.h"

namespace effops::device {

template <int kColumns>
struct ScalarQueries : BackwardScalar<kColumns> {
  using Base = BackwardScalar<kColumns>;
  using Load = typename Base::Load;
  using Base::kVisiting, Base::p, Base::own_row, Base::member;

  const RowBlock& block;
  VisitingKeys<kVisiting> keys;
  typename Base::Sums dq = {};
  RowStats row;
  RowMask mask;

  __device__ ScalarQueries(const BackwardParams& params, const RowBlock& b, char* memory)
      : Base(params, memory), block(b), keys{b} {
    const int r = min_of(block.begin + own_row, block.end - 1);
    row = reinterpret_cast<const RowStats*>(p.stats.data)[block.offset(p.a, p.stats, r)];
    mask = RowMask(p.a, block, r);
  }

  __device__ void load(int i) {
    int64_t first;
    const int count = keys.tile(i, first);
    Load::keys(p, block, Base::visiting(0), kVisiting, first, count);
  }

  __device__ void work(int i) {
    int64_t first;
    const int count = keys.tile(i, first);
    float s[Base::kEach], ds[Base::kEach];
    Base::multiply(s, 0);
    Base::multiply(ds, 1);
    const bool all = count == kVisiting && all_visible(block, first, kVisiting);
    EFFOPS_UNROLL
    for (int n = 0; n < Base::kEach; ++n) {
      const int at = member + n * Base::kRowThreads;
      Weight w = differentiate(p.a, s[n], ds[n], row);
      if (!all && (at >= count || !mask.allows(block, first + at))) w = Weight();
      Base::weights(1)[at] = w.ds;
    }
    __syncwarp();  // a row's threads share a warp
    Base::add(dq, 1, 0);
  }

  __device__ void run() {
    Load::queries(p, block, Base::own(0), Base::kOwn, block.begin, block.end - block.begin);
    visit_tiles<1>(keys.count(), [&](int i, int) { load(i); }, [&](int i, int) { work(i); });
    if (block.begin + own_row >= block.end) return;
    Base::write(p.g.dq, block.offset(p.a, p.g.dq, block.begin + own_row), p.a.p.head_dim, dq, p.scale);
  }
};

template <int kColumns>
__global__ void __launch_bounds__(ScalarQueries<kColumns>::kThreads, 4)
    scalar_backward_queries(const __grid_constant__ BackwardParams p) {
  if (const RowBlock* block = own_row_block(p.a, ScalarQueries<kColumns>::kOwn, 0))
    ScalarQueries<kColumns>(p, *block, shared_memory() + kRowBlockBytes).run();
}

}  // namespace effops::device
