// Memory between two pages that no one may touch, ending with the last byte before the second: a
// read past the end stops the process, also where it is a masked vector load that AddressSanitizer
// does not see. What lies before the first byte is out of bounds for AddressSanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace effops::test {

class Guarded {
 public:
  static constexpr unsigned char kFill = 0xff;  // a NaN in every floating-point type

  Guarded() = default;
  // `alignment` of the first byte, a power of two; up to alignment - 1 bytes then lie past the end.
  explicit Guarded(size_t bytes, size_t alignment = 1) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t placed = (bytes + alignment - 1) / alignment * alignment;
    inside_ = (placed + page - 1) / page * page;
    total_ = inside_ + 2 * page;
    void* all = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<char*>(all);
    begin_ = pages_ + page;
    if (inside_ > 0 && mprotect(begin_, inside_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = begin_ + inside_ - placed;
    std::memset(data_, kFill, bytes);
    ASAN_POISON_MEMORY_REGION(begin_, data_ - begin_);
    ASAN_POISON_MEMORY_REGION(data_ + bytes, placed - bytes);
  }
  Guarded(Guarded&& other) noexcept { swap(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Guarded() {
    if (pages_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(begin_, inside_);
    munmap(pages_, total_);
  }

  char* data() const { return data_; }
  size_t size() const { return bytes_; }
  // From here on a write stops the process.
  void freeze() {
    if (inside_ > 0 && mprotect(begin_, inside_, PROT_READ) != 0) throw std::bad_alloc();
  }

 private:
  void swap(Guarded& other) {
    std::swap(pages_, other.pages_);
    std::swap(begin_, other.begin_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(inside_, other.inside_);
    std::swap(total_, other.total_);
  }

  char *pages_ = nullptr, *begin_ = nullptr, *data_ = nullptr;
  size_t bytes_ = 0, inside_ = 0, total_ = 0;
};

}  // namespace effops::test
