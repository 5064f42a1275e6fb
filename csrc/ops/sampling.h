// Greedy tokens, for ops that take logits.
#pragma once

#include "ops/backend.h"

namespace effops::ops {

// int64 [...] of logits [..., V]: the first of equal maxima of each row.
Tensor greedy_tokens(const Backend& backend, const char* op, const char* name, Tensor logits);

}  // namespace effops::ops
