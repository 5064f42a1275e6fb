// Pairs of tiles that the backward kernels multiply: queries and output gradients of rows, keys and values. A thread
// block owns a pair and is visited by the other kind's, pair by pair.
#pragma once

#include "attention/backward_params.h"
#include "attention/load.h"

namespace effops::device {

template <class T, int kColumns, int kThreads>
struct PairLoad {
  using Rows = Tile<T, kColumns>;

  // Rows [first, first + count) of the sequence and KV head, filled up to `rows`.
  __device__ static void queries(const BackwardParams& p, const RowBlock& b, char* to, int rows, int first, int count) {
    const AttentionProblem& a = p.a.p;
    const T* q = reinterpret_cast<const T*>(a.q.data);
    const T* d_out = reinterpret_cast<const T*>(p.g.d_out.data);
    Rows::load(to, rows, count, static_cast<int>(a.head_dim), a.q.dim, p.a.aligned & AttentionParams::kAlignedQ,
               threadIdx.x, kThreads, [&](int r) { return q + b.offset(p.a, a.q, first + r); });
    Rows::load(to + Rows::bytes(rows), rows, count, static_cast<int>(a.v_dim), p.g.d_out.dim, p.aligned_d_out,
               threadIdx.x, kThreads, [&](int r) { return d_out + b.offset(p.a, p.g.d_out, first + r); });
  }

  // Keys [first, first + count) of the sequence.
  __device__ static void keys(const BackwardParams& p, const RowBlock& b, char* to, int rows, int64_t first,
                              int count) {
    const AttentionProblem& a = p.a.p;
    const KeyRows<T> k(p.a, a.k, b), v(p.a, a.v, b);
    Rows::load(to, rows, count, static_cast<int>(a.head_dim), a.k.dim, p.a.aligned & AttentionParams::kAlignedK,
               threadIdx.x, kThreads, [&](int r) { return k(first + r); });
    Rows::load(to + Rows::bytes(rows), rows, count, static_cast<int>(a.v_dim), a.v.dim,
               p.a.aligned & AttentionParams::kAlignedV, threadIdx.x, kThreads, [&](int r) { return v(first + r); });
  }

  __device__ static void stats(const BackwardParams& p, const RowBlock& b, RowStats* to, int rows, int first,
                               int count) {
    const RowStats* from = reinterpret_cast<const RowStats*>(p.stats.data);
    for (int r = threadIdx.x; r < rows; r += kThreads)
      to[r] = r < count ? from[b.offset(p.a, p.stats, first + r)] : RowStats();
  }
};

// The tiles of keys that visit a block of rows: a TileList, cut finer.
template <int kVisiting>
struct VisitingKeys {
  static constexpr int kParts = static_cast<int>(kTileKeys) / kVisiting;
  const RowBlock& block;

  __device__ int count() const { return block.last_tile * kParts; }
  // Keys of the i-th, from `first` on.
  __device__ int tile(int i, int64_t& first) const {
    int64_t keys;
    block.tiles.tile(i / kParts, first, keys);
    const int done = i % kParts * kVisiting;
    first += done;
    return static_cast<int>(clamp_to<int64_t>(keys - done, 0, kVisiting));
  }
};

// load(i, stage) and work(i, stage) of `count` tiles; with two stages a tile arrives while the one before is worked on.
// What was copied before the call has arrived before the first work, and nothing is under way at the end.
template <int kStages, class Load, class Work>
__device__ void visit_tiles(int count, Load&& load, Work&& work) {
  if (count > 0) load(0, 0);
  copy_commit();
  for (int i = 0; i < count; ++i) {
    copy_wait<0>();
    __syncthreads();  // the tile is there, and the one before has been read
    if constexpr (kStages == 2) {
      if (i + 1 < count) load(i + 1, (i + 1) % 2);
      copy_commit();
    }
    work(i, i % kStages);
    if constexpr (kStages == 1) {
      __syncthreads();
      if (i + 1 < count) load(i + 1, 0);
      copy_commit();
    }
  }
  copy_wait<0>();
}

}  // namespace effops::device
