#include "simt/global_shadow.h"

namespace effops::device::simt {

void GlobalShadow::begin_launch(int64_t bytes, int64_t blocks) {
  first_ = next_;
  if (bytes > size_ || first_ + blocks > UINT32_MAX) {
    bytes_.reset(new Byte[bytes]);
    size_ = bytes;
    first_ = 1;
  }
  next_ = static_cast<uint32_t>(first_ + blocks);
}

// Relaxed, as two blocks at the very same time may miss each other: in most runs one comes later.
int64_t GlobalShadow::access(int64_t block, int64_t at, int64_t bytes, bool write) {
  const uint32_t own = first_ + static_cast<uint32_t>(block);
  for (Byte* b = &bytes_[at]; b != &bytes_[at] + bytes; ++b) {
    const uint32_t writer = b->writer.load(std::memory_order_relaxed);
    if (of_other(writer, own)) return writer - first_;
    const uint32_t first = b->readers[0].load(std::memory_order_relaxed);
    if (!write) {
      b->readers[of_other(first, own)].store(own, std::memory_order_relaxed);
      continue;
    }
    if (of_other(first, own)) return first - first_;
    const uint32_t second = b->readers[1].load(std::memory_order_relaxed);
    if (of_other(second, own)) return second - first_;
    b->writer.store(own, std::memory_order_relaxed);
  }
  return -1;
}

}  // namespace effops::device::simt
