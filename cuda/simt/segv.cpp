#include "simt/segv.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "simt/block.h"
#include "simt/stacks.h"

namespace effops::device::simt {
#ifdef __SANITIZE_ADDRESS__

void watch_for_segv() {}
AlternateStack::AlternateStack() {}
AlternateStack::~AlternateStack() {}

#else
namespace {

constexpr size_t kSignalStackBytes = 64 * 1024;
struct sigaction before;

void handle(int signal, siginfo_t* info, void*) {
  if (const Lane* l = current_lane) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
    const bool overflow = at < l->stack && l->stack - at <= stack_step() - kStackBytes;
    const uint3& block = l->block->index;
    char text[512];
    const int length = std::snprintf(text, sizeof text, "simt: kernel %s, block (%u, %u, %u), thread %d: %s at %p\n",
                                     l->block->grid->kernel.name, block.x, block.y, block.z, l->thread,
                                     overflow ? "stack overflow" : "memory fault", info->si_addr);
    if (write(STDERR_FILENO, text, length) < 0) std::_Exit(1);
  }
  sigaction(signal, &before, nullptr);  // the instruction faults again
}

}  // namespace

void watch_for_segv() {
  static const bool once = [] {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, &before) == 0;
  }();
  (void)once;
}

AlternateStack::AlternateStack() {
  stack_t now = {};
  sigaltstack(nullptr, &now);
  if (!(now.ss_flags & SS_DISABLE)) return;
  static thread_local void* memory = nullptr;
  if (!memory) memory = std::malloc(kSignalStackBytes);
  stack_t stack = {};
  stack.ss_sp = memory;
  stack.ss_size = kSignalStackBytes;
  own_ = sigaltstack(&stack, nullptr) == 0;
}

AlternateStack::~AlternateStack() {
  if (!own_) return;
  stack_t off = {};
  off.ss_flags = SS_DISABLE;
  sigaltstack(&off, nullptr);
}

#endif
}  // namespace effops::device::simt
