// Launcher of merge_states: outs [parts, rows, dim] and lses [parts, rows], all contiguous, into
// out [rows, dim] and lse [rows]. dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. Returns a
// cudaError_t as int.
#pragma once

#include <cstdint>

extern "C" int effops_cuda_merge_states(int dtype, int64_t parts, int64_t rows, int64_t dim, const void* outs,
                                        const void* lses, void* out, void* lse, void* stream);
