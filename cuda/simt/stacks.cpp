#include "simt/stacks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace effops::device::simt {

size_t stack_step() {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return kStackBytes + page;
}

char* new_stacks(int count) {
  const size_t step = stack_step(), page = step - kStackBytes;
  void* all = mmap(nullptr, step * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  for (int i = 0; i < count; ++i) mprotect(static_cast<char*>(all) + i * step, page, PROT_NONE);
  return static_cast<char*>(all) + page;
}

}  // namespace effops::device::simt
