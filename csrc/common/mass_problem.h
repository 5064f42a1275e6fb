// Attention mass: how much attention every key of a cache has had, by which caches evict (H2O, arXiv 2306.14048).
#pragma once

#include "common/attention_problem.h"

namespace effops {

// mass[b, g, j] += the sum over rows i and the query heads h of KV head g of exp(s_ij - lse[b, i, h]), over the keys
// that the masks allow. Rows whose lse is -inf add nothing; keys at or past a sequence's length are neither read nor
// written.
struct MassProblem {
  AttentionProblem attention;  // q, k, lse, masks: no values, no result, one length of queries
  RowView mass;                // [batch, tokens, kv_heads], in the type of lse
};

}  // namespace effops
