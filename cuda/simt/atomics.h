// Atomic operations on global and shared memory, relaxed as CUDA's are, and fences.
#pragma once

#include "simt/language.h"

namespace effops::device::simt {

enum class Atomic { add, max, min, exchange };

template <class T>
T atomic(Atomic kind, T* at, T x);
template <class T>
T compare_and_swap(T* at, T expected, T desired);
void fence();

}  // namespace effops::device::simt

#define EFFOPS_SIMT_ATOMIC(name, kind, T) \
  __forceinline__ T name(T* at, T x) { return effops::device::simt::atomic(effops::device::simt::Atomic::kind, at, x); }
#define EFFOPS_SIMT_ATOMIC_OF_INTEGERS(name, kind) \
  EFFOPS_SIMT_ATOMIC(name, kind, int)              \
  EFFOPS_SIMT_ATOMIC(name, kind, unsigned)         \
  EFFOPS_SIMT_ATOMIC(name, kind, unsigned long long)
EFFOPS_SIMT_ATOMIC_OF_INTEGERS(atomicAdd, add)
EFFOPS_SIMT_ATOMIC(atomicAdd, add, float)
EFFOPS_SIMT_ATOMIC(atomicAdd, add, double)
EFFOPS_SIMT_ATOMIC_OF_INTEGERS(atomicMax, max)
EFFOPS_SIMT_ATOMIC(atomicMax, max, long long)
EFFOPS_SIMT_ATOMIC_OF_INTEGERS(atomicMin, min)
EFFOPS_SIMT_ATOMIC(atomicMin, min, long long)
EFFOPS_SIMT_ATOMIC_OF_INTEGERS(atomicExch, exchange)
EFFOPS_SIMT_ATOMIC(atomicExch, exchange, float)
#undef EFFOPS_SIMT_ATOMIC_OF_INTEGERS
#undef EFFOPS_SIMT_ATOMIC

template <class T>
__forceinline__ T atomicCAS(T* at, T expected, T desired) {
  return effops::device::simt::compare_and_swap(at, expected, desired);
}

__forceinline__ void __threadfence() { effops::device::simt::fence(); }
__forceinline__ void __threadfence_block() { effops::device::simt::fence(); }
