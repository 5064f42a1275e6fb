// dK and dV of 64 keys of a KV head, visited by the rows that see any of them; scores are transposed, so that weights
// are the left operand of both sums. The rows of a KV head span its group's query heads: nothing is left to add up.
#pragma once

#include "attention/backward_tiles.h"
#include "attention/key_block.h"
#include "attention/mask.h"

namespace effops::device {

// One of the gradients, or both where the registers hold both.
template <class T, int kColumns, bool kGetKeys, bool kGetValues>
struct BackwardKeys : BackwardTiles<T, kColumns> {
  using Base = BackwardTiles<T, kColumns>;
  using Load = typename Base::Load;
  using Base::kOwn, Base::kVisiting;

  const BackwardParams& p;
  const KeyBlock& block;
  RowSums<kColumns> dk = {}, dv = {};

  __device__ BackwardKeys(const BackwardParams& params, const KeyBlock& b, char* shared)
      : Base{shared}, p(params), block(b) {}

  __device__ int row_count(int first) const { return min_of(kVisiting, block.end - first); }

  __device__ void load(int i, int stage) {
    const int first = block.begin + i * kVisiting;
    Load::queries(p, block.rows, Base::visiting(stage, 0), kVisiting, first, row_count(first));
    Load::stats(p, block.rows, Base::stats(stage), kVisiting, first, row_count(first));
  }

  // Products to weights and gradients of scores.
  __device__ void weigh(typename Base::Products& s, typename Base::Products& ds, int first, const RowStats* stats) {
    const bool all = block.sees_all(first, row_count(first));
    EFFOPS_UNROLL
    for (int n = 0; n < kVisiting / 8; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int at = Base::column(n, e);
      const RowStats row = stats[at];
      RowMask mask;
      if (!all) mask = RowMask(p.a, block.rows, min_of(first + at, block.end - 1));
      EFFOPS_UNROLL
      for (int h = 0; h < 2; ++h) {
        float &x = s[n][2 * h + e], &dx = ds[n][2 * h + e];
        Weight w = differentiate(p.a, x, dx, row);
        if (!all && !mask.allows(block.rows, block.first + Base::own_row(h))) w = Weight();
        x = w.p;
        dx = w.ds;
      }
    }
  }

  __device__ void work(int i, int stage) {
    typename Base::Products s = {}, ds = {};
    Base::multiply(s, stage, 0);
    if constexpr (kGetKeys) Base::multiply(ds, stage, 1);
    weigh(s, ds, block.begin + i * kVisiting, Base::stats(stage));
    if constexpr (kGetValues) Base::add(dv, s, stage, 1);
    if constexpr (kGetKeys) Base::add(dk, ds, stage, 0);
  }

  __device__ void write(const TensorView4& view, const RowSums<kColumns>& sums, int64_t columns, float scale) {
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (Base::own_row(h) >= block.count) continue;
      T* to = reinterpret_cast<T*>(view.data) + block.offset(p.a, view, Base::own_row(h));
      Base::write(to, view.dim, static_cast<int>(columns), sums, h, scale);
    }
  }

  __device__ void run() {
    Load::keys(p, block.rows, Base::own(0), kOwn, block.first, block.count);
    visit_tiles<Base::kStages>((block.end - block.begin + kVisiting - 1) / kVisiting,
                               [&](int i, int stage) { load(i, stage); }, [&](int i, int stage) { work(i, stage); });
    if constexpr (kGetKeys) write(p.g.dk, dk, p.a.p.head_dim, p.scale);
    if constexpr (kGetValues) write(p.g.dv, dv, p.a.p.v_dim, 1);
  }
};

// Passes of a block, blockIdx.z: two where the registers hold the sums of dK or of dV.
template <int kColumns>
inline constexpr int kKeyPasses = kColumns <= 128 ? 1 : 2;

template <class T, int kColumns>
__global__ void __launch_bounds__(BackwardTiles<T, kColumns>::kThreads)
    backward_keys(const __grid_constant__ BackwardParams p) {
  const KeyBlock* block = own_key_block(p.a, p.key_blocks, BackwardTiles<T, kColumns>::kOwn);
  if (!block) return;
  char* shared = shared_memory() + kKeyBlockBytes;
  if constexpr (kKeyPasses<kColumns> == 1) {
    BackwardKeys<T, kColumns, true, true>(p, *block, shared).run();
  } else if (blockIdx.z == 0) {
    BackwardKeys<T, kColumns, true, false>(p, *block, shared).run();
  } else {
    BackwardKeys<T, kColumns, false, true>(p, *block, shared).run();
  }
}

}  // namespace effops::device
