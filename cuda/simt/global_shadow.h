// Which blocks have written and read each byte of the extents that a launch may write: nothing orders blocks within a
// launch, so no two may meet there. Blocks that use atomic operations on global memory are left alone from then on:
// these may order them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace effops::device::simt {

class GlobalShadow {
 public:
  static constexpr int64_t kMostBytes = 64 << 20;  // more is not followed

  // For a launch of so many blocks, which may write `bytes` bytes.
  void begin_launch(int64_t bytes, int64_t blocks);

  // Of bytes [at, at + bytes) by a block: another block that makes it a race, or -1.
  int64_t access(int64_t block, int64_t at, int64_t bytes, bool write);

 private:
  // Numbers of blocks go on from launch to launch: smaller ones are of the past, and nothing needs to be cleared.
  struct Byte {
    std::atomic<uint32_t> writer{0}, readers[2] = {};  // two readers, if there are two
  };
  bool of_other(uint32_t number, uint32_t own) const { return number >= first_ && number != own; }

  std::unique_ptr<Byte[]> bytes_;
  int64_t size_ = 0;
  uint32_t first_ = 1, next_ = 1;
};

}  // namespace effops::device::simt
