// Grow-only, 64-byte aligned working memory of the calling thread. Nothing survives its user.
#pragma once

#include <cstddef>

namespace effops {

// Blocks of a thread, so that a call's workspace outlives the tasks run by the calling thread, and a task's sums its
// steps.
enum class Scratch { task, sums, call };
inline constexpr int kScratchBlocks = 3;

// Contents are unspecified. Throws std::bad_alloc.
void* thread_scratch(Scratch which, size_t bytes);

// A call's workspace: the thread's block, or where it is large, memory of its own that does not stay.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  bool own_;
};

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
