// Tokens into expert order: the sort of their slots and the copies of their rows. Host code without a device.
#pragma once

#include "common/moe_problem.h"
#include "common/parallel.h"

namespace effops {

// A counting sort, two passes over the slots.
void sort_slots(const SlotSortProblem& p);

void permute_rows(const PermuteProblem& p, const Parallel& parallel);

}  // namespace effops
