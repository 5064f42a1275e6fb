// Whether a kernel's access is a good one.
#pragma once

#include <cstdint>

#include "simt/shadow.h"

namespace effops::device::simt {

struct Lane;

// A plain access, wherever it goes.
void check_access(Lane& lane, const void* address, int64_t bytes, Access kind, bool aligned, const void* site);

void check_global(Lane& lane, const void* address, int64_t bytes, Access kind, const void* site);

// Of an address that has to be in shared memory.
int64_t shared_offset(Lane& lane, const void* address, int64_t bytes, const char* operation, const void* site);

}  // namespace effops::device::simt
