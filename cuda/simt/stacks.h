// Stacks for fibers, each behind a page that stops overflows.
#pragma once

#include <cstddef>

namespace effops::device::simt {

#ifdef __SANITIZE_ADDRESS__
inline constexpr size_t kStackBytes = 512 * 1024;
#else
inline constexpr size_t kStackBytes = 128 * 1024;
#endif

// `count` neighbouring stacks, `stack_step()` apart, which are never given back.
char* new_stacks(int count);
size_t stack_step();

}  // namespace effops::device::simt
