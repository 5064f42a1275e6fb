#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace effops {
namespace {

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block blocks[kScratchBlocks];

}  // namespace

void* thread_scratch(Scratch which, size_t bytes) {
  Block& block = blocks[static_cast<int>(which)];
  if (bytes > block.size) {
    const size_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, size);
    if (data == nullptr) throw std::bad_alloc();
    std::free(block.data);
    block.data = data;
    block.size = size;
  }
  return block.data;
}

}  // namespace effops
