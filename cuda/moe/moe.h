// Launchers of routing and of the moves between token order and expert order.
#pragma once

#include "common/moe_problem.h"

namespace effops::device {

int topk_routing(const RoutingProblem& p, void* stream);
int64_t sort_slots_workspace(const SlotSortProblem& p);
int sort_slots(const SlotSortProblem& p, void* workspace, void* stream);
int permute_rows(const PermuteProblem& p, void* stream);
int unpermute_rows(const UnpermuteProblem& p, void* stream);

}  // namespace effops::device
