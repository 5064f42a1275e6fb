// Execution contexts of one operating-system thread, and the step from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define EFFOPS_SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifndef EFFOPS_SIMT_UCONTEXT
// Saves the registers that a function has to preserve and the stack pointer, and takes up those of the other stack.
extern "C" __attribute__((visibility("hidden"))) void effops_simt_switch(void** from, void* to);
#endif

namespace effops::device::simt {

struct Context {
#ifdef EFFOPS_SIMT_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  // For AddressSanitizer, which has to follow every step.
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// The thread's own stack.
void adopt_thread_stack(Context& c);
// Makes `c` begin in `entry`, which never returns, with a stack that ends `offset` bytes below the given one's end.
// `abandoned`: somewhere in the midst of calls, the last time.
void prepare(Context& c, char* stack, size_t bytes, size_t offset, void (*entry)(), bool abandoned);
// The first statement of an entry.
void entered();

#if defined(__SANITIZE_ADDRESS__) || defined(EFFOPS_SIMT_UCONTEXT)
void switch_context(Context& from, Context& to);
#else
inline void switch_context(Context& from, Context& to) { effops_simt_switch(&from.stack_pointer, to.stack_pointer); }
#endif
// Without a way back.
[[noreturn]] void leave_context(Context& from, Context& to);

}  // namespace effops::device::simt
