#include "simt/arena.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace effops::device::simt {

Arena::Arena() {
  const size_t bytes = kSharedGuard * 2 + kMostShared;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory) + kSharedGuard;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}

void Arena::begin_block(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  if (bytes != bytes_) {
    __asan_poison_memory_region(memory_, bytes_);
    __asan_unpoison_memory_region(memory_, bytes);
  }
#endif
  bytes_ = bytes;
  std::memset(memory_, 0xff, bytes);
}

}  // namespace effops::device::simt
