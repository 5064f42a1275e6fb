// Small kernels around the attention loops: partial results joined, rows of no sequence cleared, depths counted.
#pragma once

#include "attention/output.h"

namespace effops::device {

inline constexpr int kJoinWarps = 4;

// The sequence that token `i` of a ragged batch belongs to, if any: the last that begins at or before it.
__device__ inline int64_t sequence_of_token(const AttentionParams& a, int64_t i) {
  int64_t low = 0, high = a.p.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.p.cu_q[middle] <= i ? low : high) = middle;
  }
  return low;
}

// One warp a row, where the keys of its sequence were split. blockIdx: rows of all tokens, KV head.
template <class T>
__global__ void join_splits(const __grid_constant__ AttentionParams a) {
  const int64_t row = int64_t(blockIdx.x) * kJoinWarps + warp_index(), g = blockIdx.y;
  const int64_t token = row / a.group.divisor;
  const int64_t b = a.p.cu_q ? sequence_of_token(a, token) : token / a.p.q_len;
  if (b >= a.p.batch) return;
  const Sequence s = checked_sequence(a, b, g);
  const int64_t r64 = row - (a.p.cu_q ? s.q_begin : b * a.p.q_len) * a.group.divisor;
  const int64_t rows = s.q_len * a.group.divisor;
  if (r64 < 0 || r64 >= rows || rows > kSplitRows) return;
  const int r = static_cast<int>(r64);
  const int size = block_rows(sizeof(T) == 4, rows);
  RowBlock block = row_block_of(a, b, g, r / size, size, 0);
  if (block.splits == 1) return;
  const int splits = block.splits;
  RowSoftmax all;
  for (int i = 0; i < splits; ++i) all.top = max_of(all.top, a.partial_tops[block.slot(a, i, r)]);
  for (int i = 0; i < splits; ++i) {
    const int64_t slot = block.slot(a, i, r);
    all.sum += a.partial_sums[slot] * all.weight(a.partial_tops[slot]);
  }
  block.splits = 1;  // from here on the row is the caller's
  const RowOutput to(a, block, 0, r);
  const float scale = to.finish(a, block, r, all, lane_index() == 0);
  for (int column = lane_index(); column < a.p.v_dim; column += kWarp) {
    float x = 0;
    for (int i = 0; i < splits; ++i) {
      const int64_t slot = block.slot(a, i, r);
      x += all.weight(a.partial_tops[slot]) * a.partial_out[slot * a.p.v_dim + column];
    }
    to.template write<T>(a, column, x * scale);
  }
}

// Ragged queries: rows past the last offset are 0 and -inf. One warp a (row, head), grid-stride.
template <class T>
__global__ void clear_unowned(const __grid_constant__ AttentionParams a) {
  const int64_t begin = clamp_to<int64_t>(a.p.cu_q[a.p.batch], 0, a.limits.q_rows);
  const int64_t count = (a.limits.q_rows - begin) * a.p.heads, stride = int64_t(gridDim.x) * kJoinWarps;
  for (int64_t i = int64_t(blockIdx.x) * kJoinWarps + warp_index(); i < count; i += stride) {
    const int64_t row = begin + i / a.p.heads, head = i % a.p.heads;
    const int64_t out = row * a.p.out.token + head * a.p.out.head;
    for (int64_t column = lane_index(); column < a.p.v_dim; column += kWarp) {
      const int64_t at = out + column * a.p.out.dim;
      if (a.p.wide_out) {
        reinterpret_cast<float*>(a.p.out.data)[at] = 0;
      } else {
        reinterpret_cast<T*>(a.p.out.data)[at] = T{};
      }
    }
    if (lane_index() == 0)
      reinterpret_cast<float*>(a.p.lse.data)[row * a.p.lse.token + head * a.p.lse.head] = -INFINITY;
  }
}

struct CountDepths {
  const uint64_t* ancestors;
  const int32_t* cu_q;  // null: every row has all tokens
  int32_t* depths;      // [rows, tokens]
  int64_t rows, tokens, words, ancestors_row;
};

// A node's depth where none was given: its bits below its sequence's T, less one.
static __global__ void count_depths(const __grid_constant__ CountDepths c) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < c.rows * c.tokens; i += stride) {
    const int64_t row = i / c.tokens, token = i % c.tokens;
    const int64_t own = c.cu_q ? clamp_to<int64_t>(c.cu_q[row + 1] - c.cu_q[row], 0, c.tokens) : c.tokens;
    if (token >= own) continue;
    const uint64_t* bits = c.ancestors + row * c.ancestors_row + token * c.words;
    int count = -1;
    for (int64_t w = 0; w * 64 < own; ++w)
      count += __popcll(own - w * 64 < 64 ? bits[w] & ((uint64_t(1) << (own - w * 64)) - 1) : bits[w]);
    c.depths[i] = count;
  }
}

}  // namespace effops::device
