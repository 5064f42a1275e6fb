// Launcher of emulated processing in memory.
#pragma once

#include "common/pim_problem.h"

namespace effops::device {

int pim_gemv(const PimGemvProblem& p, void* stream);

}  // namespace effops::device
