// A block's shared memory, in the midst of addresses that nothing else has.
#pragma once

#include <cstdint>

namespace effops::device::simt {

inline constexpr int64_t kMostShared = 227 * 1024;  // of a block on sm_90
inline constexpr int64_t kSharedGuard = 1 << 20;

class Arena {
 public:
  Arena();
  // Poisons `bytes` for a new block: as floats they are NaN.
  void begin_block(int64_t bytes);

  char* begin() const { return memory_; }
  // Does the address lie in it or near it?
  bool owns(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(memory_) + kSharedGuard < uintptr_t(kMostShared + 2 * kSharedGuard);
  }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace effops::device::simt
