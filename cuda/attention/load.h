// Rows of q, k or v into a swizzled tile of shared memory: strided or paged, cut off and filled up with zeros.
#pragma once

#include "attention/row_block.h"
#include "primitives/copy_async.h"
#include "primitives/swizzle.h"

namespace effops::device {

template <class T>
inline constexpr int kChunkItems = 16 / static_cast<int>(sizeof(T));

// Can rows of this view be read in 16-byte pieces?
template <class T>
bool aligned_rows(const TensorView4& x, bool ragged) {
  const int64_t item = sizeof(T);
  return x.dim == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.token * item % 16 == 0 &&
         x.head * item % 16 == 0 && (ragged || x.batch * item % 16 == 0);
}

template <class T, int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / kChunkItems<T>;
  using Place = Swizzle<kChunks>;
  static constexpr int bytes(int rows) { return rows * Place::kRowBytes; }

  // Rows [0, count) come from row(i), a pointer to `dim` elements that lie `stride` apart, or null for an absent row;
  // rows up to `rows` become zero. Threads `thread` of `threads` share the work; a copy_commit has to follow.
  template <class Row>
  __device__ static void load(char* to, int rows, int count, int dim, int64_t stride, bool aligned, int thread,
                              int threads, Row&& row) {
    if (aligned) {
      for (int i = thread; i < rows * kChunks; i += threads) {
        const int r = i / kChunks, chunk = i % kChunks;
        const T* from = r < count ? row(r) : nullptr;
        const int left = (dim - chunk * kChunkItems<T>)*static_cast<int>(sizeof(T));
        const int bytes = from ? clamp_to(left, 0, 16) : 0;
        copy_async(to + Place::offset(r, chunk), bytes ? from + chunk * kChunkItems<T> : nullptr, bytes);
      }
      return;
    }
    for (int i = thread; i < rows * kColumns; i += threads) {
      const int r = i / kColumns, c = i % kColumns;
      const T* from = r < count && c < dim ? row(r) : nullptr;
      *at(to, r, c) = from ? from[c * stride] : T{};
    }
  }

  __device__ static T* at(char* tile, int row, int column) {
    return reinterpret_cast<T*>(tile + Place::offset(row, column / kChunkItems<T>)) + column % kChunkItems<T>;
  }
};

// The keys or values of a sequence and KV head.
template <class T>
struct KeyRows {
  const T* base;
  const Listed& listed;
  int64_t token, page_stride;
  int64_t table, entry;  // where the sequence's page table begins, and the step from entry to entry
  const AttentionParams& a;

  __device__ KeyRows(const AttentionParams& params, const TensorView4& x, const RowBlock& r)
      : listed(r.listed), a(params) {
    const bool paged = a.p.pages.given();
    const int64_t g = a.p.kv_share > 1 ? r.g / a.p.kv_share : r.g;
    base = reinterpret_cast<const T*>(x.data) + g * x.head +
           (paged      ? 0
            : a.p.cu_k ? r.s.k_begin * x.token
                       : r.b * x.batch);
    token = x.token;
    page_stride = x.batch;
    table = r.b * a.p.pages.batch + g * a.p.pages.head;
    entry = a.p.pages.entry;
  }

  // Null where the page table names no page, or a list no token.
  __device__ const T* operator()(int64_t j) const {
    if (listed.list) {
      j = listed.token(j);
      if (j < 0) return nullptr;
    }
    if (!a.p.pages.given()) return base + j * token;
    const uint32_t place = a.page.quotient(static_cast<uint32_t>(j));
    const int64_t page = a.p.pages.data[table + place * entry];
    if (page < 0 || page >= a.limits.pages) return nullptr;
    return base + page * page_stride + (j - int64_t(place) * a.page.divisor) * token;
  }
};

}  // namespace effops::device
