// Grow-only, 64-byte aligned working memory of the calling thread. Nothing survives its user.
#pragma once

#include <cstddef>

namespace effops {

// Two blocks a thread, so that a call's workspace outlives the tasks run by the calling thread.
enum class Scratch { task, call };

// Contents are unspecified. Throws std::bad_alloc.
void* thread_scratch(Scratch which, size_t bytes);

// Sequential carving of one block: measured with a null base, then placed.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(size_t count) {
    const size_t at = used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace effops
