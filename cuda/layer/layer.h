// Launchers of the element-wise steps of a decoder layer.
#pragma once

#include "common/layer_problem.h"

namespace effops::device {

int add(const AddProblem& p, void* stream);
int rms_norm(const RmsNormProblem& p, void* stream);
int rotary(const RotaryProblem& p, void* stream);
int rotary_append(const RotaryAppendProblem& p, void* stream);
int silu_mul(const SiluMulProblem& p, void* stream);

}  // namespace effops::device
