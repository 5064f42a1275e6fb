#include "common/moe_sort.h"

#include <algorithm>
#include <cstring>

namespace effops {

void sort_slots(const SlotSortProblem& p) {
  std::fill(p.offsets, p.offsets + p.experts, 0);
  auto for_slots = [&](auto&& body) {
    int32_t slot = 0;
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t j = 0; j < p.k; ++j) {
        const int32_t id = p.ids[t * p.token + j * p.choice];
        body(slot++, id, id >= 0 && id < p.experts);
      }
  };
  for_slots([&](int32_t, int32_t id, bool kept) {
    if (kept) ++p.offsets[id];
  });
  // Counts become beginnings, and, as places are taken, ends.
  int32_t dropped = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int32_t count = p.offsets[e];
    p.offsets[e] = dropped;
    dropped += count;
  }
  for_slots([&](int32_t slot, int32_t id, bool kept) {
    const int32_t place = kept ? p.offsets[id]++ : dropped++;
    p.order[place] = slot;
    p.inverse[slot] = kept ? place : -1;
  });
}

void permute_rows(const PermuteProblem& p, const Parallel& parallel) {
  constexpr int64_t kPieceBytes = 1 << 16, kSerialBytes = 1 << 18;
  const int64_t item = static_cast<int64_t>(size_of(p.dtype)), bytes = p.dim * item;
  if (bytes == 0) return;
  const int64_t kept = p.experts > 0 ? p.offsets[p.experts - 1] : 0;
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / bytes);
  parallel.for_each((p.slots + piece - 1) / piece, p.slots * bytes > kSerialBytes, [&](int64_t task) {
    for (int64_t i = task * piece; i < std::min(p.slots, (task + 1) * piece); ++i) {
      if (i < kept) {
        std::memcpy(p.y + i * bytes, p.x + p.order[i] / p.k * p.x_row * item, bytes);
      } else {
        std::memset(p.y + i * bytes, 0, bytes);
      }
    }
  });
}

}  // namespace effops
