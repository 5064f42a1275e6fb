// Attention in float32 by FMA: blocks of sixteen rows, eight neighbouring threads a row, against half tiles of keys.
// One loop for few rows and for many: there is no tensor core for exact float32.
#pragma once

#include "attention/load.h"
#include "attention/mask.h"
#include "attention/output.h"
#include "primitives/vector.h"

namespace effops::device {

template <int kColumns>
struct Scalar {
  using Rows = Tile<float, kColumns>;
  static constexpr int kRows = kStreamRows, kRowThreads = 8, kThreads = kRows * kRowThreads;
  static constexpr int kKeys = kTileKeys / 2, kOwn = kKeys / kRowThreads;  // keys at once; of a thread
  static constexpr int kVectors = kColumns / (4 * kRowThreads);            // of four output columns, a thread
  static constexpr int kTileBytes = Rows::bytes(kKeys);
  static constexpr int kWeightStride = kKeys + 1;  // rows on different banks
  static constexpr int kSharedBytes = kRowBlockBytes + Rows::bytes(kRows) + 2 * kTileBytes + kRows * kWeightStride * 4;

  const AttentionParams& a;
  const RowBlock& block;
  char *queries, *key_tile, *value_tile;
  float* weights;  // of this thread's row
  KeyRows<float> keys, values;
  int own_row, member;  // this thread's row in the block, and its place in the row
  float o[kVectors][4] = {};
  RowSoftmax row;
  RowMask mask;

  __device__ Scalar(const AttentionParams& params, const RowBlock& b, char* shared)
      : a(params),
        block(b),
        queries(shared),
        key_tile(queries + Rows::bytes(kRows)),
        value_tile(key_tile + kTileBytes),
        keys(a, a.p.k, b),
        values(a, a.p.v, b),
        own_row(threadIdx.x / kRowThreads),
        member(threadIdx.x % kRowThreads),
        mask(a, b, min_of(b.begin + own_row, b.end - 1)) {
    weights = reinterpret_cast<float*>(value_tile + kTileBytes) + own_row * kWeightStride;
  }

  __device__ void load(int64_t first, int count) {
    Rows::load(key_tile, kKeys, count, static_cast<int>(a.p.head_dim), a.p.k.dim,
               a.aligned & AttentionParams::kAlignedK, threadIdx.x, kThreads, [&](int r) { return keys(first + r); });
    Rows::load(value_tile, kKeys, count, static_cast<int>(a.p.v_dim), a.p.v.dim, a.aligned & AttentionParams::kAlignedV,
               threadIdx.x, kThreads, [&](int r) { return values(first + r); });
    copy_commit();
    copy_wait<0>();
    __syncthreads();
  }

  __device__ void take(int64_t first, int count) {
    float s[kOwn] = {};  // keys member, member + 8, …
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const Float4 q = load_float4(queries + Rows::Place::offset(own_row, chunk));
      EFFOPS_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        const Float4 k = load_float4(key_tile + Rows::Place::offset(member + n * kRowThreads, chunk));
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) s[n] = fmaf(q.x[e], k.x[e], s[n]);
      }
    }
    const bool all = count == kKeys && all_visible(block, first, kKeys);
    float top = -INFINITY;
    EFFOPS_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const int at = member + n * kRowThreads;
      s[n] = score_of(a, s[n]);
      if (!all && (at >= count || !mask.allows(block, first + at))) s[n] = -INFINITY;
      top = max_of(top, s[n]);
    }
    const float factor = row.rescale(reduce_lanes<kRowThreads>(top, Max()));
    EFFOPS_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const float weight = row.weight(s[n]);
      weights[member + n * kRowThreads] = weight;
      row.sum += weight;
    }
    __syncwarp();  // a row's threads share a warp
    EFFOPS_UNROLL
    for (int n = 0; n < kVectors; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) o[n][e] *= factor;
    for (int j = 0; j < kKeys; ++j) {
      const float weight = weights[j];
      EFFOPS_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        const Float4 v = load_float4(value_tile + Rows::Place::offset(j, member + n * kRowThreads));
        EFFOPS_UNROLL
        for (int e = 0; e < 4; ++e) o[n][e] = fmaf(weight, v.x[e], o[n][e]);
      }
    }
  }

  __device__ void write(int split) {
    row.sum = reduce_lanes<kRowThreads>(row.sum, Sum());
    const int r = block.begin + own_row;
    if (r >= block.end) return;
    const RowOutput to(a, block, split, r);
    const float scale = to.finish(a, block, r, row, member == 0);
    EFFOPS_UNROLL
    for (int n = 0; n < kVectors; ++n) EFFOPS_UNROLL
    for (int e = 0; e < 4; ++e) to.template write<float>(a, (member + n * kRowThreads) * 4 + e, o[n][e] * scale);
  }

  __device__ void run(int split) {
    const float* base = reinterpret_cast<const float*>(a.p.q.data);
    Rows::load(queries, kRows, block.end - block.begin, static_cast<int>(a.p.head_dim), a.p.q.dim,
               a.aligned & AttentionParams::kAlignedQ, threadIdx.x, kThreads,
               [&](int r) { return base + block.offset(a, a.p.q, block.begin + r); });
    copy_commit();
    for (int i = block.first_tile; i < block.last_tile; ++i) {
      int64_t first, count;
      block.tiles.tile(i, first, count);
      for (int64_t done = 0; done < count; done += kKeys) {
        const int part = static_cast<int>(min_of<int64_t>(count - done, kKeys));
        load(first + done, part);
        take(first + done, part);
        __syncthreads();  // keys and values have been read
      }
    }
    copy_wait<0>();
    write(split);
  }
};

template <int kColumns>
__global__ void __launch_bounds__(Scalar<kColumns>::kThreads, 2)
    scalar_attention(const __grid_constant__ AttentionParams a) {
  if (const RowBlock* block = own_row_block(a, Scalar<kColumns>::kRows, 0))
    Scalar<kColumns>(a, *block, shared_memory() + kRowBlockBytes).run(blockIdx.z);
}

}  // namespace effops::device
