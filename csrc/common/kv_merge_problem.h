// Keys and values that a cache evicts are merged into those that stay (LOOK-M, arXiv 2406.18139).
#pragma once

#include <limits>

#include "common/dtype.h"
#include "common/views.h"

namespace effops {

enum class KvMerge : int8_t { none, averaged, pivotal, weighted };

// Of each sequence and head the entries `kept` stay and move to the front in their order; every other valid one is
// merged into the kept one whose key is most similar to its own, of equals the first.
struct KvMergeProblem {
  DType dtype = DType::f32;
  KvMerge mode = KvMerge::pivotal;
  double least = -std::numeric_limits<double>::infinity();  // similarity of an entry that is merged
  int64_t batch = 0, slots = 0, heads = 0, k_dim = 0, v_dim = 0;
  TensorView4 k, v;               // [batch, slots, heads, dim]
  Selection kept;                 // [batch, heads, entries]: ascending, then negative to the end
  const int32_t* lens = nullptr;  // [batch]; null: all slots
  int32_t* nearest = nullptr;     // [batch, heads, slots]: an entry's place among the kept ones; -1: merged into none
  char* similarity = nullptr;     // [batch, heads, slots] in the compute type: that of the keys, 0 where none was asked

  EFFOPS_HD int64_t len(int64_t b) const { return lens ? clamp_to<int64_t>(lens[b], 0, slots) : slots; }
  EFFOPS_HD int64_t entry(int64_t b, int64_t g, int64_t i) const { return kept.list(b, g)[i * kept.entry]; }
  EFFOPS_HD int64_t at(int64_t b, int64_t g, int64_t slot) const { return (b * heads + g) * slots + slot; }
};

// A norm by which a key is divided; 0, for a key that is like no other, where that is not a finite normal number.
template <class C>
EFFOPS_HD C usable_norm(C norm) {
  constexpr C least = std::numeric_limits<C>::min(), most = std::numeric_limits<C>::max();
  return norm >= least && norm <= most ? norm : C(0);
}

// What an evicted number adds to the kept one that it is merged into, but for the division by one more than the number
// of entries that are. Of a duplicate: exactly 0, unless weighted.
template <class C>
EFFOPS_HD C merged_part(KvMerge mode, C evicted, C kept, C similarity) {
  switch (mode) {
    case KvMerge::none:
      return 0;
    case KvMerge::averaged:
      return evicted - kept;
    case KvMerge::pivotal:
      return (evicted - kept) / 2;
    case KvMerge::weighted:
      return similarity * evicted - kept;
  }
  return 0;
}

}  // namespace effops
