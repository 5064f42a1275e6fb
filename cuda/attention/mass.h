// Launcher of accumulate_mass.
#pragma once

#include "common/device_attention_plan.h"
#include "common/mass_problem.h"

namespace effops::device {

int attention_mass(const MassProblem& m, const AttentionLimits& limits, void* stream);

}  // namespace effops::device
