// Backward attention on the device.
#pragma once

#include "attention/params.h"

namespace effops::device {

int64_t attention_backward_workspace(const AttentionProblem& p, const AttentionLimits& limits);

// From out and lse of the forward pass. All gradients arrive zeroed: what belongs to no sequence, and keys that do not
// exist, are left alone. No pages and no trees.
int attention_backward(const AttentionProblem& p, const AttentionGradients& g, const AttentionLimits& limits,
                       void* workspace, void* stream);

}  // namespace effops::device
