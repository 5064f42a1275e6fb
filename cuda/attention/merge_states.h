// Launcher of merge_states.
#pragma once

#include "common/layer_problem.h"

namespace effops::device {

int merge_states(const MergeProblem& p, void* stream);

}  // namespace effops::device
