#include "simt/context.h"

#include <cstdint>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// It ends in a plain return: fibers mostly wait at the same place, so the processor predicts all of them well.
#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl effops_simt_switch
  .hidden effops_simt_switch
  .type effops_simt_switch, @function
effops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size effops_simt_switch, .-effops_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .p2align 4
  .globl effops_simt_switch
  .hidden effops_simt_switch
  .type effops_simt_switch, %function
effops_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size effops_simt_switch, .-effops_simt_switch
)");
#endif

namespace effops::device::simt {
namespace {

void swap(Context& from, Context& to) {
#ifdef EFFOPS_SIMT_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  effops_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

}  // namespace

void adopt_thread_stack([[maybe_unused]] Context& c) {
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &c.stack_bytes);
  pthread_attr_destroy(&attributes);
  c.stack = static_cast<char*>(stack);
#endif
}

void prepare(Context& c, char* stack, size_t bytes, size_t offset, void (*entry)(), [[maybe_unused]] bool abandoned) {
  c.stack = stack;
  c.stack_bytes = bytes;
  c.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kLastFrames = 16 * 1024;
  const size_t used = abandoned ? bytes : kLastFrames;
  __asan_unpoison_memory_region(stack + bytes - used, used);
#endif
#if defined(EFFOPS_SIMT_UCONTEXT)
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = stack;
  c.state.uc_stack.ss_size = bytes - offset;
  c.state.uc_link = nullptr;
  makecontext(&c.state, entry, 0);
#elif defined(__x86_64__)
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + bytes - offset) - 1;  // as behind a call: 8 modulo 16
  *top = 0;                                                                 // nowhere to return to
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  c.stack_pointer = top;
#else
  uint64_t* frame = reinterpret_cast<uint64_t*>(stack + bytes - offset) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uint64_t>(entry);
  c.stack_pointer = frame;
#endif
}

void entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_ADDRESS__) || defined(EFFOPS_SIMT_UCONTEXT)
void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  swap(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}
#endif

void leave_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
  swap(from, to);
  std::abort();
}

}  // namespace effops::device::simt
