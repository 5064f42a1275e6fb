// The atomic operations of -fsanitize=thread: std::atomic of host code, guards of static variables.
#include <cstdint>

#include "simt/block.h"
#include "simt/memory.h"

namespace {

using effops::device::simt::Access;

void seen(const volatile void* at, int64_t bytes, Access kind, const void* site) {
  using namespace effops::device::simt;
  if (Lane* lane = current_lane) check_access(*lane, const_cast<const void*>(at), bytes, kind, true, site);
}

}  // namespace

// Memory orders are strengthened to the strongest.
#define EFFOPS_SIMT_FETCH(bits, operation, builtin)                                                      \
  uint##bits##_t __tsan_atomic##bits##_##operation(volatile uint##bits##_t* at, uint##bits##_t x, int) { \
    seen(at, bits / 8, Access::atomic, __builtin_return_address(0));                                     \
    return builtin(at, x, __ATOMIC_SEQ_CST);                                                             \
  }
#define EFFOPS_SIMT_EXCHANGE(bits, strength, weak)                                                             \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile uint##bits##_t* at, uint##bits##_t* expected, \
                                                        uint##bits##_t desired, int, int) {                    \
    seen(at, bits / 8, Access::atomic, __builtin_return_address(0));                                           \
    return __atomic_compare_exchange_n(at, expected, desired, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
  }
#define EFFOPS_SIMT_ATOMICS(bits)                                                        \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* at, int) {    \
    seen(at, bits / 8, Access::read, __builtin_return_address(0));                       \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                        \
  }                                                                                      \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* at, uint##bits##_t x, int) { \
    seen(at, bits / 8, Access::atomic, __builtin_return_address(0));                     \
    __atomic_store_n(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                      \
  EFFOPS_SIMT_FETCH(bits, exchange, __atomic_exchange_n)                                 \
  EFFOPS_SIMT_FETCH(bits, fetch_add, __atomic_fetch_add)                                 \
  EFFOPS_SIMT_FETCH(bits, fetch_sub, __atomic_fetch_sub)                                 \
  EFFOPS_SIMT_FETCH(bits, fetch_and, __atomic_fetch_and)                                 \
  EFFOPS_SIMT_FETCH(bits, fetch_or, __atomic_fetch_or)                                   \
  EFFOPS_SIMT_FETCH(bits, fetch_xor, __atomic_fetch_xor)                                 \
  EFFOPS_SIMT_EXCHANGE(bits, strong, false)                                              \
  EFFOPS_SIMT_EXCHANGE(bits, weak, true)

extern "C" {

EFFOPS_SIMT_ATOMICS(8)
EFFOPS_SIMT_ATOMICS(16)
EFFOPS_SIMT_ATOMICS(32)
EFFOPS_SIMT_ATOMICS(64)

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"
