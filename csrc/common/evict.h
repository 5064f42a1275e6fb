// Appends to caches of a fixed number of slots, in which every KV head holds tokens of its own: the same on every
// instruction set.
#pragma once

#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/views.h"

namespace effops {

// A new token takes the first free slot; where there is none, that of the entry with the least mass, of equals the
// oldest, among those whose position is neither below num_sinks nor above the new token's less `recent`. It begins with
// mass 0. Tokens of a sequence go one after the other.
struct EvictProblem {
  int64_t batch = 0, tokens = 0, heads = 0, slots = 0;
  int64_t k_dim = 0, v_dim = 0, bytes = 0;  // bytes: of an element
  TensorView4 k, v, k_cache, v_cache;       // [batch, tokens, heads, dim] into [batch, slots, heads, dim]
  DType mass_dtype = DType::f32;            // float32 or float64
  RowView mass, positions;                  // [batch, slots, heads]; positions: int32, the slot's token, negative: free
  TokenIndices new_positions;               // negative skips
  int64_t recent = 1, num_sinks = 0;

  // Positions of entries that may make room for a new token; none where the last is below the first.
  EFFOPS_HD int32_t first_to_go() const { return static_cast<int32_t>(min_of<int64_t>(num_sinks, INT32_MAX)); }
  EFFOPS_HD int32_t last_to_go(int64_t new_position) const {
    return static_cast<int32_t>(max_of<int64_t>(new_position - recent, -1));
  }
};

// A mass as eviction compares it: what is no number is never the least.
template <class T>
EFFOPS_HD T rank_of(T mass, T infinity) {
  return mass == mass ? mass : infinity;
}

// The slots [batch, heads, tokens] that the tokens take; -1: skipped. Throws std::runtime_error where a token finds no
// free slot and no entry that may go.
std::vector<int32_t> plan_evictions(const EvictProblem& p, const Parallel& parallel);

// Writes nothing where the plan throws.
void append_evicting(const EvictProblem& p, const Parallel& parallel);

}  // namespace effops
