#include "simt/atomics.h"

#include "simt/block.h"
#include "simt/memory.h"

namespace effops::device::simt {
namespace {

template <class T>
T combined(Atomic kind, T a, T b) {
  switch (kind) {
    case Atomic::add:
      return a + b;
    case Atomic::max:
      return a < b ? b : a;
    case Atomic::min:
      return b < a ? b : a;
    case Atomic::exchange:
      return b;
  }
  return a;
}

template <class T>
void check(T* at, const void* site) {
  check_access(*current_lane, at, sizeof(T), Access::atomic, true, site);
}

}  // namespace

template <class T>
T atomic(Atomic kind, T* at, T x) {
  check(at, __builtin_return_address(0));
  T before, after;
  __atomic_load(at, &before, __ATOMIC_RELAXED);
  do {
    after = combined(kind, before, x);
  } while (!__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <class T>
T compare_and_swap(T* at, T expected, T desired) {
  check(at, __builtin_return_address(0));
  __atomic_compare_exchange(at, &expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template int atomic(Atomic, int*, int);
template unsigned atomic(Atomic, unsigned*, unsigned);
template long long atomic(Atomic, long long*, long long);
template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long);
template float atomic(Atomic, float*, float);
template double atomic(Atomic, double*, double);
template int compare_and_swap(int*, int, int);
template unsigned compare_and_swap(unsigned*, unsigned, unsigned);
template unsigned long long compare_and_swap(unsigned long long*, unsigned long long, unsigned long long);

}  // namespace effops::device::simt
