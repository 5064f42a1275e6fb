// Slots in expert order, for ops that take ids.
#pragma once

#include "ops/backend.h"

namespace effops::ops {

struct SortedSlots {
  Tensor order, inverse, offsets;  // int32 [M], [N, K], [E]
};

// Of int32 ids [N, K], checked here. The tensors are the caller's to keep while kernels use them.
SortedSlots sort_slots(const Backend& backend, const Arg& ids, int64_t experts);

}  // namespace effops::ops
