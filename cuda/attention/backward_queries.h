// dQ of 64 rows of a KV head, visited by the tiles of keys that they see.
#pragma once

#include "attention/backward_tiles.h"
#include "attention/mask.h"

namespace effops::device {

template <class T, int kColumns>
struct BackwardQueries : BackwardTiles<T, kColumns> {
  using Base = BackwardTiles<T, kColumns>;
  using Load = typename Base::Load;
  using Base::kOwn, Base::kVisiting;

  const BackwardParams& p;
  const RowBlock& block;
  VisitingKeys<kVisiting> keys;
  RowSums<kColumns> dq = {};
  RowStats row[2];
  RowMask mask[2];

  __device__ BackwardQueries(const BackwardParams& params, const RowBlock& b, char* shared)
      : Base{shared}, p(params), block(b), keys{b} {
    const RowStats* from = reinterpret_cast<const RowStats*>(p.stats.data);
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = min_of(block.begin + Base::own_row(h), block.end - 1);
      row[h] = from[block.offset(p.a, p.stats, r)];
      mask[h] = RowMask(p.a, block, r);
    }
  }

  __device__ void load(int i, int stage) {
    int64_t first;
    const int count = keys.tile(i, first);
    Load::keys(p, block, Base::visiting(stage, 0), kVisiting, first, count);
  }

  // Products to gradients of scores, in ds.
  __device__ void weigh(typename Base::Products& s, typename Base::Products& ds, int i) {
    int64_t first;
    const int count = keys.tile(i, first);
    const bool all = count == kVisiting && all_visible(block, first, kVisiting);
    EFFOPS_UNROLL
    for (int n = 0; n < kVisiting / 8; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int at = Base::column(n, e % 2);
      Weight w = differentiate(p.a, s[n][e], ds[n][e], row[e / 2]);
      if (!all && (at >= count || !mask[e / 2].allows(block, first + at))) w = Weight();
      ds[n][e] = w.ds;
    }
  }

  __device__ void work(int i, int stage) {
    typename Base::Products s = {}, ds = {};
    Base::multiply(s, stage, 0);
    Base::multiply(ds, stage, 1);
    weigh(s, ds, i);
    Base::add(dq, ds, stage, 0);
  }

  __device__ void run() {
    Load::queries(p, block, Base::own(0), kOwn, block.begin, block.end - block.begin);
    visit_tiles<Base::kStages>(
        keys.count(), [&](int i, int stage) { load(i, stage); }, [&](int i, int stage) { work(i, stage); });
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = block.begin + Base::own_row(h);
      if (r >= block.end) continue;
      T* to = reinterpret_cast<T*>(p.g.dq.data) + block.offset(p.a, p.g.dq, r);
      Base::write(to, p.g.dq.dim, static_cast<int>(p.a.p.head_dim), dq, h, p.scale);
    }
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(BackwardTiles<T, kColumns>::kThreads)
    backward_queries(const __grid_constant__ BackwardParams p) {
  if (const RowBlock* block = own_row_block(p.a, BackwardTiles<T, kColumns>::kOwn, 0))
    BackwardQueries<T, kColumns>(p, *block, shared_memory() + kRowBlockBytes).run();
}

}  // namespace effops::device
