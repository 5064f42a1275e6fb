// Launcher of linear layers with weights in few bits.
#pragma once

#include "common/packed_problem.h"

namespace effops::device {

int packed_linear(const PackedLinearProblem& p, void* stream);

}  // namespace effops::device
