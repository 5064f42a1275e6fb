// How kernels see tensors: a pointer and strides in elements.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace effops {

struct TensorView4 {  // [batch, tokens, heads, dim]; batch stride unused when ragged
  char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, dim = 0;
};

struct RowView {  // [batch, tokens, heads], float32 (float64 for float64 problems)
  char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

struct RowSpace {  // rows numbered through up to three outer dimensions: row index -> element offset
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};

  EFFOPS_HD int64_t rows() const { return size[0] * size[1] * size[2]; }
  EFFOPS_HD int64_t offset(int64_t row) const {
    const int64_t c = row % size[2], ab = row / size[2];
    return ab / size[1] * stride[0] + ab % size[1] * stride[1] + c * stride[2];
  }
};

struct TokenIndices {  // int32 [batch, tokens]: positions, cache slots
  const int32_t* data = nullptr;
  int64_t batch = 0, token = 0;

  EFFOPS_HD int64_t of(int64_t b, int64_t t) const { return data[b * batch + t * token]; }
};

// Where the logical tokens of a sequence lie in a paged cache: token j in row of(b, h, j) of the pages,
// a [pages, page tokens, heads, dim] view.
struct PageTable {
  const int32_t* data = nullptr;  // [batch, (heads,) entries]; null: the cache is not paged
  int64_t batch = 0, head = 0, entry = 1;
  int64_t page = 1;  // tokens a page

  EFFOPS_HD bool given() const { return data != nullptr; }
  EFFOPS_HD int64_t entry_of(int64_t b, int64_t h, int64_t i) const { return data[b * batch + h * head + i * entry]; }
  // Offset in elements of token j, head apart.
  EFFOPS_HD int64_t offset(const TensorView4& pages, int64_t b, int64_t h, int64_t j) const {
    return entry_of(b, h, j / page) * pages.batch + j % page * pages.token;
  }
};

// The logical tokens that a sequence's heads attend to, in any order; entries below 0 name none.
struct Selection {
  const int32_t* data = nullptr;  // [batch, heads, entries]; null: all tokens
  int64_t batch = 0, head = 0, entry = 1;
  int64_t count = 0;                // entries
  const int32_t* counts = nullptr;  // [batch, heads]: those that are there, before the others; null: any may be
  int64_t counts_batch = 0, counts_head = 0;

  EFFOPS_HD bool given() const { return data != nullptr; }
  EFFOPS_HD const int32_t* list(int64_t b, int64_t h) const { return data + b * batch + h * head; }
  EFFOPS_HD int64_t count_of(int64_t b, int64_t h) const {
    return counts ? counts[b * counts_batch + h * counts_head] : count;
  }
};

struct CacheLimits {             // what a device kernel may rely on: places outside are absent
  int64_t slots = 0, pages = 0;  // of a sequence; of a paged cache
};

// Offset in elements of token `slot` of a cache, paged or not.
EFFOPS_HD inline int64_t cache_offset(const TensorView4& cache, const PageTable& pages, int64_t b, int64_t h,
                                      int64_t slot) {
  const int64_t token = pages.given() ? pages.offset(cache, b, h, slot) : b * cache.batch + slot * cache.token;
  return token + h * cache.head;
}

}  // namespace effops
