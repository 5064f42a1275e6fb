// Weights in few bits (common/packed_problem.h) as arguments of ops: [N, row bytes] of a dtype that says the format.
#pragma once

#include "common/packed_problem.h"
#include "ops/tensor.h"

namespace effops::ops {

// uint8: two int4 a byte; int8; float8_e4m3fn.
bool is_packed(const Arg& weight);

// Of K = `in` inputs. Its rows say the groups: K numbers, padded to 8, and 4 bytes a group.
PackedMatrix packed_matrix(const Arg& weight, int64_t in, const Arg& like);

}  // namespace effops::ops
