// The streaming loop: up to sixteen rows of a KV head against many keys (decode, small trees). The four warps of a
// block take sixteen keys each of a tile and pipeline them on their own, without a barrier until their results are
// joined.
#pragma once

#include "attention/fragments.h"
#include "attention/mask.h"
#include "attention/output.h"

namespace effops::device {

template <class T, int kColumns>
struct Stream {
  using Rows = Tile<T, kColumns>;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kSlab = kTileKeys / kWarps;  // keys of a warp
  static constexpr int kStages = kColumns > 192 ? 2 : 3;
  static constexpr int kAtOnce = kStepsAtOnce<kColumns>, kGroups = kColumns / (16 * kAtOnce);
  // Shared memory: queries, then each warp's stages; in the end sums and tops, factors, and each warp's rows.
  static constexpr int kQueryBytes = Rows::bytes(kStreamRows), kSlabBytes = Rows::bytes(kSlab);
  static constexpr int kWarpBytes = kStages * 2 * kSlabBytes;
  static constexpr int kJoinColumns = kColumns + 8;  // rows on different banks
  static constexpr int kSharedBytes = kRowBlockBytes + kQueryBytes + kWarps * kWarpBytes;
  static_assert(kRowBlockBytes + kWarps * kStreamRows * 4 * (2 + kJoinColumns) <= kSharedBytes);
  static constexpr bool kKeepQueries = kColumns <= 192;  // in registers

  const AttentionParams& a;
  const RowBlock& block;
  char* shared;
  KeyRows<T> keys, values;
  bool aligned_k, aligned_v;
  uint32_t q[kKeepQueries ? kGroups : 1][kAtOnce][4];
  RowSums<kColumns> o = {};
  RowSoftmax row[2];  // rows lane / 4 and lane / 4 + 8; sums are of this lane's keys
  RowMask mask[2];

  __device__ Stream(const AttentionParams& params, const RowBlock& b, char* memory)
      : a(params), block(b), shared(memory), keys(a, a.p.k, b), values(a, a.p.v, b) {
    aligned_k = a.aligned & AttentionParams::kAlignedK;
    aligned_v = a.aligned & AttentionParams::kAlignedV;
    for (int h = 0; h < 2; ++h) mask[h] = RowMask(a, b, min_of(lane_index() / 4 + 8 * h, b.rows - 1));
  }

  __device__ char* slab(int stage, int which) const {
    return shared + kQueryBytes + warp_index() * kWarpBytes + (2 * stage + which) * kSlabBytes;
  }

  // This warp's keys of tile i.
  __device__ int slab_of(int i, int64_t& first) const {
    int64_t count;
    block.tiles.tile(i, first, count);
    first += warp_index() * kSlab;
    return static_cast<int>(clamp_to<int64_t>(count - warp_index() * kSlab, 0, kSlab));
  }

  __device__ void load_queries() {
    const T* base = reinterpret_cast<const T*>(a.p.q.data);
    Rows::load(shared, kStreamRows, block.rows, static_cast<int>(a.p.head_dim), a.p.q.dim,
               a.aligned & AttentionParams::kAlignedQ, threadIdx.x, kThreads,
               [&](int r) { return base + block.offset(a, a.p.q, r); });
    copy_commit();
  }

  // Tile i into a stage; beyond the split's tiles an empty group keeps the count.
  __device__ void load_tile(int i, int stage) {
    if (i < block.last_tile) {
      int64_t first;
      const int count = slab_of(i, first);
      Rows::load(slab(stage, 0), kSlab, count, static_cast<int>(a.p.head_dim), a.p.k.dim, aligned_k, lane_index(),
                 kWarp, [&](int r) { return keys(first + r); });
      Rows::load(slab(stage, 1), kSlab, count, static_cast<int>(a.p.v_dim), a.p.v.dim, aligned_v, lane_index(), kWarp,
                 [&](int r) { return values(first + r); });
    }
    copy_commit();
  }

  __device__ void take_tile(int i, int stage) {
    int64_t first;
    const int count = slab_of(i, first);
    if (count == 0) return;
    float s[2][4] = {};
    EFFOPS_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      uint32_t k[kAtOnce][4];
      load_right_steps<T, kColumns>(k, slab(stage, 0), 0, n * kAtOnce);
      if constexpr (!kKeepQueries) load_left<T, kColumns>(q[0], shared, 0, n * kAtOnce);
      EFFOPS_UNROLL
      for (int m = 0; m < kAtOnce; ++m) {
        const uint32_t pair[2][2] = {{k[m][0], k[m][1]}, {k[m][2], k[m][3]}};
        mma_row<T>(s, q[kKeepQueries ? n : 0][m], pair);
      }
    }
    const bool all = count == kSlab && all_visible(block, first, kSlab);
    float factor[2];
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
      EFFOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& x = s[e / 2][2 * h + e % 2];
        x = score_of(a, x);
        const int at = e / 2 * 8 + lane_index() % 4 * 2 + e % 2;
        if (!all && (at >= count || !mask[h].allows(block, first + at))) x = -INFINITY;
        top = max_of(top, x);
      }
      factor[h] = row[h].rescale(reduce_lanes<4>(top, Max()));
      EFFOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& x = s[e / 2][2 * h + e % 2];
        x = row[h].weight(x);
        row[h].sum += x;
      }
    }
    uint32_t p[4];
    as_left<T>(p, s[0], s[1]);
    EFFOPS_UNROLL
    for (int n = 0; n < kGroups; ++n) {
      EFFOPS_UNROLL
      for (int m = 0; m < 2 * kAtOnce; ++m) EFFOPS_UNROLL
      for (int e = 0; e < 4; ++e) o[n][m][e] *= factor[e / 2];
      uint32_t v[kAtOnce][4], pairs[2 * kAtOnce][2];
      load_right_transposed<T, kColumns>(v, slab(stage, 1), 0, n * kAtOnce);
      as_pairs(pairs, v);
      mma_row<T>(o[n], p, pairs);
    }
  }

  // Joins the four warps' rows in shared memory and writes them.
  __device__ void join(int split) {
    float* tops = reinterpret_cast<float*>(shared);
    float* sums = tops + kWarps * kStreamRows;
    float* rows = sums + kWarps * kStreamRows;
    const int lane = lane_index(), warp = warp_index();
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = lane / 4 + 8 * h;
      row[h].sum = reduce_lanes<4>(row[h].sum, Sum());
      if (lane % 4 == 0) {
        tops[warp * kStreamRows + r] = row[h].top;
        sums[warp * kStreamRows + r] = row[h].sum;
      }
      float* to = rows + (warp * kStreamRows + r) * kJoinColumns + lane % 4 * 2;
      EFFOPS_UNROLL
      for (int n = 0; n < 2 * kAtOnce * kGroups; ++n) EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e) to[n * 8 + e] = o[n / (2 * kAtOnce)][n % (2 * kAtOnce)][2 * h + e];
    }
    __syncthreads();
    const int r = threadIdx.x;
    if (r < block.rows) {
      RowSoftmax all;
      for (int w = 0; w < kWarps; ++w) all.top = max_of(all.top, tops[w * kStreamRows + r]);
      for (int w = 0; w < kWarps; ++w) all.sum += sums[w * kStreamRows + r] * all.weight(tops[w * kStreamRows + r]);
      const float scale = RowOutput(a, block, split, r).finish(a, block, r, all, true);
      for (int w = 0; w < kWarps; ++w) tops[w * kStreamRows + r] = all.weight(tops[w * kStreamRows + r]) * scale;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < block.rows * kColumns; i += kThreads) {
      const int at = i / kColumns, column = i % kColumns;
      float x = 0;
      for (int w = 0; w < kWarps; ++w)
        x += rows[(w * kStreamRows + at) * kJoinColumns + column] * tops[w * kStreamRows + at];
      RowOutput(a, block, split, at).template write<T>(a, column, x);
    }
  }

  __device__ void run(int split) {
    load_queries();
    for (int stage = 0; stage < kStages - 1; ++stage) load_tile(block.first_tile + stage, stage);
    copy_wait<kStages - 1>();
    __syncthreads();
    EFFOPS_UNROLL
    for (int n = 0; n < kGroups; ++n)
      if constexpr (kKeepQueries) load_left<T, kColumns>(q[n], shared, 0, n * kAtOnce);
    int stage = 0;
    for (int i = block.first_tile; i < block.last_tile; ++i) {
      copy_wait<kStages - 2>();
      __syncwarp();  // this tile is seen, and the stage before it is free
      load_tile(i + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      take_tile(i, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncthreads();
    join(split);
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(Stream<T, kColumns>::kThreads)
    stream_attention(const __grid_constant__ AttentionParams a) {
  RowBlock& block = *reinterpret_cast<RowBlock*>(shared_memory());
  if (threadIdx.x == 0) block = row_block_of(a, blockIdx.x, blockIdx.y, 0, kStreamRows, blockIdx.z);
  __syncthreads();
  if (block.rows > kStreamRows || !block.has_work(blockIdx.z)) return;
  Stream<T, kColumns>(a, block, shared_memory() + kRowBlockBytes).run(blockIdx.z);
}

}  // namespace effops::device
