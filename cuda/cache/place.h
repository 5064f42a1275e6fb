// Where the tokens of a sequence lie in a cache, and which of a call's tokens stay where several name one slot.
#pragma once

#include "common/views.h"
#include "primitives/element.h"
#include "primitives/launch.h"
#include "primitives/reduce.h"

namespace effops::device {

// Offset in elements of a slot; -1 where there is no such place.
__device__ inline int64_t place_of(const TensorView4& cache, const PageTable& pages, const CacheLimits& limits,
                                   int64_t b, int64_t h, int64_t slot) {
  if (slot < 0 || slot >= limits.slots) return -1;
  if (pages.given()) {
    const int64_t page = pages.entry_of(b, h, slot / pages.page);
    if (page < 0 || page >= limits.pages) return -1;
  }
  return cache_offset(cache, pages, b, h, slot);
}

template <class T>
bool cache_in_pieces(const TensorView4& x, int64_t dim) {
  return x.dim == 1 && in_pieces(x.data, sizeof(T), {dim, x.token, x.head, x.batch});
}

// start(an unsigned of so many bytes): rows are copied, whatever they hold.
template <class F>
int with_storage(int64_t bytes, F&& start) {
  switch (bytes) {
    case 2:
      return start(uint16_t());
    case 4:
      return start(uint32_t());
    case 8:
      return start(uint64_t());
  }
  return kUnsupported;
}

// The tokens [first, first + count) of a sequence, which a block writes. Of two that name one slot the later stays, so
// that those named again are marked. Looking through all later tokens is cheap: as a rule their slots lie beyond.
struct SlotTile {
  static constexpr int kMost = 128;
  static constexpr int kSharedBytes = (kWarp + 2 * kMost) * 4;

  int *slots, *again;
  int count;

  // The threads of a block together.
  __device__ SlotTile(const TokenIndices& all, int64_t b, int64_t first, int64_t tokens, int size) {
    int* const scratch = reinterpret_cast<int*>(shared_memory());
    slots = scratch + kWarp;
    again = slots + kMost;
    count = static_cast<int>(min_of<int64_t>(size, tokens - first));
    int low = INT32_MAX, high = -1;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int slot = static_cast<int>(all.of(b, first + i));
      slots[i] = slot;
      again[i] = 0;
      if (slot >= 0) low = min_of(low, slot);
      high = max_of(high, slot);
    }
    high = reduce_block(high, Max(), -1, scratch);
    low = -reduce_block(-low, Max(), -INT32_MAX, scratch);
    for (int64_t t = first + 1 + threadIdx.x; t < tokens; t += blockDim.x) {
      const int slot = static_cast<int>(all.of(b, t));
      if (slot < low || slot > high) continue;
      const int before = static_cast<int>(min_of<int64_t>(count, t - first));
      for (int i = 0; i < before; ++i)
        if (slots[i] == slot) atomicExch(&again[i], 1);
    }
    __syncthreads();
  }

  // Of token first + i; -1: nothing is written.
  __device__ int64_t slot(int i) const { return again[i] ? -1 : slots[i]; }

  // Tokens a block.
  static int size(int64_t tokens) { return tokens < 1024 ? 32 : kMost; }
};

}  // namespace effops::device
