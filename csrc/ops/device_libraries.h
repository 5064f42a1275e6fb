// The libraries of device kernels that a process may use, and what they need from outside.
#pragma once

#include "ops/backend.h"

namespace effops::ops {

// The host machine's where EFFOPS_BACKEND=simt asks for it, else null. Throws where it is not found.
const DeviceLibrary* simt_library();
// The memory that the next kernels may touch; replaces what was given before.
void permit_simt_memory(const MemoryExtent* extents, int64_t count);

// The one of this build. Throws where there is none.
const DeviceLibrary* cuda_library(const char* op);
void* current_cuda_stream(const char* op, int32_t device);

}  // namespace effops::ops
