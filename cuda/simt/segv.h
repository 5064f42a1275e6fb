// A message that names the kernel before a real memory fault ends the process.
#pragma once

namespace effops::device::simt {

// Once a process.
void watch_for_segv();

// Gives this thread a stack for signal handlers while it lives: a fiber may have overflowed its own.
class AlternateStack {
 public:
  AlternateStack();
  ~AlternateStack();
  AlternateStack(const AlternateStack&) = delete;
  AlternateStack& operator=(const AlternateStack&) = delete;

 private:
  bool own_ = false;
};

}  // namespace effops::device::simt
