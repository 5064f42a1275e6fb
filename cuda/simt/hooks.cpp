// What -fsanitize=thread makes a kernel's code call for every access to memory. No libtsan is linked: the calls end
// here. Outside of kernels they do nothing.
#include "simt/block.h"
#include "simt/memory.h"
#include "simt/stacks.h"

namespace effops::device::simt {
namespace {

__attribute__((always_inline)) inline void seen(const void* address, int64_t bytes, Access kind, bool aligned,
                                                const void* site) {
  Lane* lane = current_lane;
  if (!lane || reinterpret_cast<uintptr_t>(address) - lane->stack < kStackBytes) return;
  check_access(*lane, address, bytes, kind, aligned, site);
}

}  // namespace
}  // namespace effops::device::simt

#define EFFOPS_SIMT_HOOK(name, bytes, kind, aligned)                                                                 \
  extern "C" void name(const void* at) {                                                                             \
    effops::device::simt::seen(at, bytes, effops::device::simt::Access::kind, aligned, __builtin_return_address(0)); \
  }
#define EFFOPS_SIMT_HOOKS(bytes)                                     \
  EFFOPS_SIMT_HOOK(__tsan_read##bytes, bytes, read, true)            \
  EFFOPS_SIMT_HOOK(__tsan_write##bytes, bytes, write, true)          \
  EFFOPS_SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, read, false) \
  EFFOPS_SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, write, false)
EFFOPS_SIMT_HOOKS(1)
EFFOPS_SIMT_HOOKS(2)
EFFOPS_SIMT_HOOKS(4)
EFFOPS_SIMT_HOOKS(8)
EFFOPS_SIMT_HOOKS(16)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_read_range(const void* at, size_t bytes) {
  effops::device::simt::seen(at, bytes, effops::device::simt::Access::read, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* at, size_t bytes) {
  effops::device::simt::seen(at, bytes, effops::device::simt::Access::write, false, __builtin_return_address(0));
}

}  // extern "C"
