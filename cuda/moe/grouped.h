// Launchers of grouped products and their weight gradient.
#pragma once

#include "common/grouped_problem.h"

namespace effops::device {

int64_t grouped_workspace(const GroupedProblem& p);
int grouped(const GroupedProblem& p, void* workspace, void* stream);
int64_t grouped_gradient_workspace(const GroupedGradientProblem& p);
int grouped_gradient(const GroupedGradientProblem& p, void* workspace, void* stream);

}  // namespace effops::device
