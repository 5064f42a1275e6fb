// Launcher of the filtered laws of next tokens and the draws from them.
#pragma once

#include "common/sampling_problem.h"

namespace effops::device {

int sampling(const SamplingProblem& p, int64_t* flaw, void* stream);

}  // namespace effops::device
