// The host machine's side of the primitives, and launches.
#pragma once

#include <cstddef>

#include "simt/language.h"

namespace effops::device::simt {

[[gnu::const]] char* shared_memory();

float widen_f16(uint16_t bits);
uint16_t narrow_bf16(float x);
uint16_t narrow_f16(float x);

// Warp operations: d [n][4], b [n][2]; to [n][4], rows [n].
void mma_m16n8k16(bool is_bf16, float* d, const uint32_t* a, const uint32_t* b, int n);
void ldmatrix_x4(bool transposed, uint32_t* to, const void* const* rows, int n);

void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int pending);

void check_aligned(const void* p, int bytes);

// Volatile makes one access of it, as it is on a GPU: a host compiler would leave out words that nobody uses.
using Words16 = uint32_t __attribute__((vector_size(16), may_alias));
__forceinline__ Words16 load16(const void* from) {
  check_aligned(from, 16);
  return *static_cast<const volatile Words16*>(from);
}
__forceinline__ void store16(void* to, Words16 x) {
  check_aligned(to, 16);
  *static_cast<volatile Words16*>(to) = x;
}

// All threads of the block meet; the source line is compared, so that no two different barriers are taken for one.
void barrier(const char* file, int line);
// Whole warps meet: `threads` of them in all, ids 1 to 15.
void named_barrier(int id, int threads, bool wait);

struct Kernel {
  const char* name;
  dim3 grid;
  int threads;
  int64_t shared_bytes;
  void (*run)(const void* body);
  const void* body;
  size_t body_bytes;
};

// 0, or a status that last_report() explains.
int launch(const Kernel& kernel);
const char* last_report();
// Of the calling thread's last launch: how many more passes over the banks of shared memory ldmatrix took than without
// conflicts; with EFFOPS_SIMT_BANKS=1 plain accesses and cp.async too.
int64_t last_bank_conflicts();

template <class Body>
int launch(const char* name, dim3 grid, int threads, int64_t shared_bytes, const Body& body) {
  return launch(Kernel{name, grid, threads, shared_bytes, [](const void* b) { (*static_cast<const Body*>(b))(); },
                       &body, sizeof(Body)});
}

}  // namespace effops::device::simt

__forceinline__ void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  effops::device::simt::barrier(file, line);
}
