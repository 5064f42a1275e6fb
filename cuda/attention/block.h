// The GEMM-shaped loop: blocks of 64 rows of a KV head, sixteen a warp, against tiles of 64 keys that all warps share
// (FlashAttention-2; Dao 2023, algorithm 1). While scores are computed the tile's values arrive, while they are weighed
// the next tile's keys.
#pragma once

#include "attention/fragments.h"
#include "attention/mask.h"
#include "attention/output.h"

namespace effops::device {

template <class T, int kColumns>
struct Block {
  using Rows = Tile<T, kColumns>;
  static constexpr int kWarps = kBlockRows / 16, kThreads = kWarps * kWarp;
  static constexpr int kKeys = kTileKeys;
  static constexpr int kAtOnce = kStepsAtOnce<kColumns>, kGroups = kColumns / (16 * kAtOnce);
  static constexpr int kTileBytes = Rows::bytes(kKeys);
  static constexpr int kSharedBytes = kRowBlockBytes + Rows::bytes(kBlockRows) + 2 * kTileBytes;

  const AttentionParams& a;
  const RowBlock& block;
  char *queries, *key_tile, *value_tile;
  KeyRows<T> keys, values;
  int first_row;  // of this warp, in the block
  RowSums<kColumns> o = {};
  RowSoftmax row[2];
  RowMask mask[2];

  __device__ Block(const AttentionParams& params, const RowBlock& b, char* shared)
      : a(params),
        block(b),
        queries(shared),
        key_tile(shared + Rows::bytes(kBlockRows)),
        value_tile(key_tile + kTileBytes),
        keys(a, a.p.k, b),
        values(a, a.p.v, b),
        first_row(warp_index() * 16) {
    for (int h = 0; h < 2; ++h) mask[h] = RowMask(a, b, min_of(row_of(h), b.end - 1));
  }

  // Of the sequence: this lane's upper and lower row.
  __device__ int row_of(int half) const { return block.begin + first_row + lane_index() / 4 + 8 * half; }

  __device__ void load_queries() {
    const T* base = reinterpret_cast<const T*>(a.p.q.data);
    Rows::load(queries, kBlockRows, block.end - block.begin, static_cast<int>(a.p.head_dim), a.p.q.dim,
               a.aligned & AttentionParams::kAlignedQ, threadIdx.x, kThreads,
               [&](int r) { return base + block.offset(a, a.p.q, block.begin + r); });
  }
  __device__ void load_keys(int i) {
    int64_t first, count;
    block.tiles.tile(i, first, count);
    Rows::load(key_tile, kKeys, static_cast<int>(count), static_cast<int>(a.p.head_dim), a.p.k.dim,
               a.aligned & AttentionParams::kAlignedK, threadIdx.x, kThreads, [&](int r) { return keys(first + r); });
  }
  __device__ void load_values(int i) {
    int64_t first, count;
    block.tiles.tile(i, first, count);
    Rows::load(value_tile, kKeys, static_cast<int>(count), static_cast<int>(a.p.v_dim), a.p.v.dim,
               a.aligned & AttentionParams::kAlignedV, threadIdx.x, kThreads, [&](int r) { return values(first + r); });
  }

  // Scores to weights; everything summed before is rescaled.
  __device__ void weigh(float (&s)[kKeys / 8][4], int i) {
    int64_t first, count;
    block.tiles.tile(i, first, count);
    const bool all = count == kKeys && all_visible(block, first, kKeys);
    float factor[2];
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
      EFFOPS_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) EFFOPS_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[n][e] = score_of(a, s[n][e]);
        if (!all) {
          const int at = n * 8 + lane_index() % 4 * 2 + e % 2;
          if (at >= count || !mask[h].allows(block, first + at)) s[n][e] = -INFINITY;
        }
        top = max_of(top, s[n][e]);
      }
      factor[h] = row[h].rescale(reduce_lanes<4>(top, Max()));
      EFFOPS_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) EFFOPS_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        s[n][e] = row[h].weight(s[n][e]);
        row[h].sum += s[n][e];
      }
    }
    EFFOPS_UNROLL
    for (int n = 0; n < kGroups; ++n) EFFOPS_UNROLL
    for (int m = 0; m < 2 * kAtOnce; ++m) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) o[n][m][e] *= factor[e / 2];
  }

  __device__ void write(int split) {
    EFFOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      row[h].sum = reduce_lanes<4>(row[h].sum, Sum());
      const int r = row_of(h);
      if (r >= block.end) continue;
      const RowOutput to(a, block, split, r);
      const float scale = to.finish(a, block, r, row[h], lane_index() % 4 == 0);
      EFFOPS_UNROLL
      for (int n = 0; n < 2 * kAtOnce * kGroups; ++n) EFFOPS_UNROLL
      for (int e = 0; e < 2; ++e)
        to.template write<T>(a, n * 8 + lane_index() % 4 * 2 + e,
                             o[n / (2 * kAtOnce)][n % (2 * kAtOnce)][2 * h + e] * scale);
    }
  }

  __device__ void run(int split) {
    load_queries();
    if (block.first_tile < block.last_tile) load_keys(block.first_tile);
    copy_commit();
    for (int i = block.first_tile; i < block.last_tile; ++i) {
      load_values(i);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      float s[kKeys / 8][4] = {};
      add_row_products<T, kColumns>(s, queries, first_row, key_tile);
      __syncthreads();  // the keys have been read
      if (i + 1 < block.last_tile) load_keys(i + 1);
      copy_commit();
      weigh(s, i);
      copy_wait<1>();
      __syncthreads();
      add_product<T, kColumns>(o, s, value_tile);
      __syncthreads();  // the values have been read
    }
    copy_wait<0>();
    write(split);
  }
};

template <class T, int kColumns>
__global__ void __launch_bounds__(Block<T, kColumns>::kThreads)
    block_attention(const __grid_constant__ AttentionParams a) {
  if (const RowBlock* block = own_row_block(a, kBlockRows, kStreamRows))
    Block<T, kColumns>(a, *block, shared_memory() + kRowBlockBytes).run(blockIdx.z);
}

}  // namespace effops::device
