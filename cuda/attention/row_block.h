// Which rows and keys a thread block has. Sizes follow from the sequence alone, never from the batch; index values that
// are out of range leave a sequence without keys or rows.
#pragma once

#include "attention/params.h"
#include "primitives/reduce.h"

namespace effops::device {

__device__ inline Sequence checked_sequence(const AttentionParams& a, int64_t b, int64_t g) {
  Sequence s = sequence_of(a.p, b, g);
  if (a.p.cu_q &&
      (s.q_begin < 0 || s.q_len < 0 || s.q_len > a.limits.max_q_len || s.q_begin + s.q_len > a.limits.q_rows))
    s.q_len = 0;
  if (s.ancestors && s.q_len > a.p.tree.tokens) s.q_len = 0;
  const bool keys = s.kv_len >= 0 && s.kv_len <= a.limits.max_kv_len && (!s.ancestors || s.kv_len >= s.q_len) &&
                    (!a.p.cu_k || (s.k_begin >= 0 && s.k_begin + s.kv_len <= a.limits.k_rows));
  if (!keys) s.kv_len = 0;
  s.kv_start = clamp_to<int64_t>(s.kv_start, 0, s.kv_len);
  return s;
}

// The tokens that a KV head's keys are, where they are selected; those out of range are absent.
struct Listed {
  const int32_t* list;  // null: key j is token j
  int64_t entry, start, end;

  __device__ static Listed of(const AttentionParams& a, int64_t b, int64_t g) {
    const AttentionProblem& p = a.p;
    if (!p.selected.given()) return {nullptr, 0, 0, 0};
    const int64_t heads = p.kv_heads / p.kv_share;
    const int64_t end = p.kv_lens ? p.kv_lens[p.lens_a_head ? b * heads + g / p.kv_share : b] : p.kv_capacity;
    return {p.selected.list(b, g), p.selected.entry, p.kv_starts ? max_of(p.kv_starts[b], 0) : 0,
            min_of(end, p.kv_capacity)};
  }
  // -1: absent.
  __device__ int64_t token(int64_t j) const {
    const int64_t t = list[j * entry];
    return t >= start && t < end ? t : -1;
  }
};

struct RowBlock {
  int64_t b, g;
  Listed listed;
  Sequence s;
  Visibility see;
  TileList tiles;
  int rows, begin, end;               // of the sequence and KV head; of this block
  Positions positions;                // of this block's rows
  int splits, first_tile, last_tile;  // of this split

  __device__ bool has_work(int split) const { return begin < end && split < splits; }

  // Row `r` of the sequence: head r % group of token r / group.
  __device__ static int64_t token_of(const AttentionParams& a, int r) { return a.group.quotient(r); }
  __device__ int64_t head_of(const AttentionParams& a, int r) const {
    return g * a.group.divisor + a.group.remainder(r);
  }

  __device__ int64_t offset(const AttentionParams& a, const TensorView4& x, int r) const {
    return (a.p.cu_q ? s.q_begin * x.token : b * x.batch) + token_of(a, r) * x.token + head_of(a, r) * x.head;
  }
  __device__ int64_t offset(const AttentionParams& a, const RowView& x, int r) const {
    return (a.p.cu_q ? s.q_begin * x.token : b * x.batch) + token_of(a, r) * x.token + head_of(a, r) * x.head;
  }
  // Of the partial result of split `i` of row r.
  __device__ int64_t slot(const AttentionParams& a, int i, int r) const {
    return (b * a.p.kv_heads + g) * a.slots + int64_t(i) * rows + r;
  }
};

// Rows [index * block, …) of a sequence and KV head, and the tiles of its split.
__device__ inline RowBlock row_block_of(const AttentionParams& a, int64_t b, int64_t g, int index, int block,
                                        int split) {
  RowBlock r;
  r.b = b;
  r.g = g;
  r.s = checked_sequence(a, b, g);
  r.rows = static_cast<int>(r.s.q_len * a.group.divisor);
  r.begin = min_of(index * block, r.rows);
  r.end = min_of(r.begin + block, r.rows);
  r.splits = r.first_tile = r.last_tile = 0;
  if (r.begin == r.end) return r;
  r.listed = Listed::of(a, b, g);
  r.see = visibility_of(a.p, r.s, g);
  r.positions = r.s.positions(RowBlock::token_of(a, r.begin), RowBlock::token_of(a, r.end - 1));
  r.tiles = TileList::of(r.see, r.positions);
  const int tiles = static_cast<int>(r.tiles.count());
  const int limit = min_of(split_limit(r.rows, block), a.splits);
  const int size = max_of(kSplitTiles, (tiles + limit - 1) / limit);
  r.splits = max_of(1, (tiles + size - 1) / size);
  r.first_tile = min_of(split * size, tiles);
  r.last_tile = min_of(r.first_tile + size, tiles);
  return r;
}

// The row block in shared memory, found by one warp for all; the rest of the block's shared memory begins behind it.
inline constexpr int kRowBlockBytes = 288;
static_assert(sizeof(RowBlock) <= kRowBlockBytes);

// The x-th row block of a ragged batch, over the sequences of more than `above` rows: its sequence, or -1, and its
// place there. The lanes of each warp look together.
__device__ inline int64_t find_row_block(const AttentionParams& a, int64_t x, int block, int above, int& index) {
  int64_t before = 0;
  for (int64_t first = 0; first < a.p.batch; first += kWarp) {
    const int64_t b = first + lane_index();
    const int64_t rows = b < a.p.batch ? checked_sequence(a, b, 0).q_len * a.group.divisor : 0;
    const int64_t own = rows > above ? (rows + block - 1) / block : 0;
    int64_t sum = own;  // of this lane and those below it
    EFFOPS_UNROLL
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_index() >= step) sum += lower;
    }
    const unsigned beyond = __ballot_sync(kAllLanes, before + sum > x);
    if (beyond != 0) {
      const int lane = __ffs(beyond) - 1;
      index = static_cast<int>(x - before - __shfl_sync(kAllLanes, sum - own, lane));
      return first + lane;
    }
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return -1;
}

// This thread block's rows and keys; blockIdx: row block over all sequences, KV head, split. Sequences of `above` rows
// or fewer have none here. Null: nothing to do.
__device__ inline const RowBlock* own_row_block(const AttentionParams& a, int block, int above) {
  RowBlock* r = reinterpret_cast<RowBlock*>(shared_memory());
  if (warp_index() == 0) {
    int64_t b = blockIdx.x / a.row_blocks;
    int index = blockIdx.x % a.row_blocks;
    if (a.p.cu_q) b = find_row_block(a, blockIdx.x, block, above, index);
    if (lane_index() == 0) {
      if (b < 0) {
        r->begin = r->end = 0;
      } else {
        *r = row_block_of(a, b, blockIdx.y, index, block, blockIdx.z);
      }
    }
  }
  __syncthreads();
  return r->has_work(blockIdx.z) ? r : nullptr;
}

}  // namespace effops::device
