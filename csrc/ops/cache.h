// Checks of the ops that write into a cache, dense or in pages.
#pragma once

#include "ops/attention.h"

namespace effops::ops {

struct CacheShape {
  int64_t capacity = 0, heads = 0;  // tokens a sequence may have
  int64_t page_count = 0;
  PageTable pages;
  PageTableArg table;

  CacheLimits limits() const { return {capacity, page_count}; }
};

// k and v [B, L, G, D], or [P, page, G, D] beside a page table.
CacheShape cache_shape(const Arg& k, const Arg& v, const OptionalTensor& page_table, int64_t batch);

// The page of a slot exists. For calls whose values are checked.
void check_slot_pages(const Arg& like, const CacheShape& cache, int64_t b, int64_t slot);

// int32 [B, T], -1 or a place in the cache, all of it checked.
TokenIndices slots_of(const Arg& slots, const Arg& like, const CacheShape& cache, int64_t batch, int64_t tokens);

}  // namespace effops::ops
