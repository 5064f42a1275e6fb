// What both loops of accumulate_mass share: a thread block owns some keys of a KV head, which all rows that see any of
// them visit; no sum is shared by blocks.
#pragma once

#include "attention/backward_load.h"
#include "attention/key_block.h"
#include "attention/mask.h"
#include "attention/softmax.h"
#include "primitives/math.h"

namespace effops::device {

struct MassParams {
  AttentionParams a;
  RowView mass;
  int key_blocks = 0;  // of every sequence
};

template <class T, int kColumns, int kThreads>
struct MassLoad {
  using Rows = Tile<T, kColumns>;

  __device__ static void keys(const AttentionParams& a, const KeyBlock& block, char* to, int rows) {
    const KeyRows<T> k(a, a.p.k, block.rows);
    Rows::load(to, rows, block.count, static_cast<int>(a.p.head_dim), a.p.k.dim, a.aligned & AttentionParams::kAlignedK,
               threadIdx.x, kThreads, [&](int r) { return k(block.first + r); });
  }

  // Rows [first, first + count) of the KV head, and what is taken off their scores in base 2: infinite for a row
  // without keys, and for what fills the tile up.
  __device__ static void queries(const AttentionParams& a, const RowBlock& b, char* to, float* lse2, int rows,
                                 int first, int count) {
    const T* q = reinterpret_cast<const T*>(a.p.q.data);
    Rows::load(to, rows, count, static_cast<int>(a.p.head_dim), a.p.q.dim, a.aligned & AttentionParams::kAlignedQ,
               threadIdx.x, kThreads, [&](int r) { return q + b.offset(a, a.p.q, first + r); });
    const float* lse = reinterpret_cast<const float*>(a.p.lse.data);
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      const float x = r < count ? lse[b.offset(a, a.p.lse, first + r)] : -INFINITY;
      lse2[r] = x == -INFINITY ? INFINITY : x * kLog2e;
    }
  }
};

__device__ inline void add_mass(const MassParams& p, const KeyBlock& block, int key, float sum) {
  if (key >= block.count) return;
  const RowView& m = p.mass;
  reinterpret_cast<float*>(m.data)[block.rows.b * m.batch + (block.first + key) * m.token + block.rows.g * m.head] +=
      sum;
}

}  // namespace effops::device
