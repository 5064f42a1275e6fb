// Which keys a thread block owns, and which rows of their sequence see any of them: TileList the other way round.
#pragma once

#include "attention/row_block.h"

namespace effops::device {

// Queries at consecutive positions: those that see some key of [first, last], and those that see all of them.
struct TokenRange {
  int64_t begin, end, all_begin, all_end;

  __device__ static TokenRange of(const Visibility& see, const Sequence& s, int64_t first, int64_t last) {
    const int64_t origin = s.position(0), window = min_of(see.window, see.len);
    const auto token = [&](int64_t position) { return clamp_to<int64_t>(position - origin, 0, s.q_len); };
    TokenRange r;
    r.begin = see.causal && first >= see.prefix_end ? token(first) : 0;
    r.all_begin = see.causal && last >= see.prefix_end ? token(last) : 0;
    r.end = see.window && first >= see.sinks_end ? token(last + window) : s.q_len;
    r.all_end = see.window && last >= see.sinks_end ? token(first + window) : s.q_len;
    return r;
  }
};

struct KeyBlock {
  RowBlock rows;           // names the sequence and KV head
  int64_t first;           // key of the sequence
  int count;               // keys
  int begin, end;          // rows of the sequence and KV head that see any of them
  int all_begin, all_end;  // rows that see all of them

  __device__ bool sees_all(int first_row, int row_count) const {
    return first_row >= all_begin && first_row + row_count <= all_end;
  }
  __device__ int64_t offset(const AttentionParams& a, const TensorView4& x, int key) const {
    return (a.p.cu_k ? rows.s.k_begin * x.token : rows.b * x.batch) + (first + key) * x.token + rows.g * x.head;
  }
};

inline constexpr int kKeyBlockBytes = 384;
static_assert(sizeof(KeyBlock) <= kKeyBlockBytes);

// Where keys are ragged, sequence b has the block numbers from cu_k[b] / block + b on: there are enough before those of
// the next one. The last sequence that begins at x or before.
__device__ inline int64_t find_key_block(const AttentionParams& a, int64_t x, int block, int& index) {
  const auto begin = [&](int64_t b) { return max_of(a.p.cu_k[b], 0) / block + b; };
  int64_t low = 0, high = a.p.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (begin(middle) <= x ? low : high) = middle;
  }
  index = static_cast<int>(max_of<int64_t>(x - begin(low), 0));
  return low;
}

__device__ inline KeyBlock key_block_of(const AttentionParams& a, int64_t b, int64_t g, int index, int block) {
  KeyBlock k;
  k.rows = row_block_of(a, b, g, 0, kBlockRows, 0);
  k.first = k.rows.s.kv_start + int64_t(index) * block;
  k.count = static_cast<int>(clamp_to<int64_t>(k.rows.s.kv_len - k.first, 0, block));
  if (k.rows.rows == 0) k.count = 0;
  if (k.count == 0) return k;
  const TokenRange range = TokenRange::of(k.rows.see, k.rows.s, k.first, k.first + k.count - 1);
  const int group = static_cast<int>(a.group.divisor);
  k.begin = static_cast<int>(range.begin) * group;
  k.end = max_of(k.begin, static_cast<int>(range.end) * group);
  k.all_begin = static_cast<int>(range.all_begin) * group;
  k.all_end = static_cast<int>(range.all_end) * group;
  return k;
}

// This thread block's keys; blockIdx: key block over all sequences (`key_blocks` of each where keys are not ragged), KV
// head. Null: there are none.
__device__ inline const KeyBlock* own_key_block(const AttentionParams& a, int key_blocks, int block) {
  KeyBlock* k = reinterpret_cast<KeyBlock*>(shared_memory());
  if (threadIdx.x == 0) {
    int index;
    int64_t b;
    if (a.p.cu_k) {
      b = find_key_block(a, blockIdx.x, block, index);
    } else {
      b = blockIdx.x / key_blocks;
      index = blockIdx.x % key_blocks;
    }
    *k = key_block_of(a, b, blockIdx.y, index, block);
  }
  __syncthreads();
  return k->count > 0 ? k : nullptr;
}

// Where keys are ragged, an upper bound of the key blocks of all sequences.
inline int64_t key_blocks_in_all(const AttentionParams& a, int key_blocks, int block) {
  return a.p.cu_k ? a.limits.k_rows / block + a.p.batch : a.p.batch * key_blocks;
}

}  // namespace effops::device
