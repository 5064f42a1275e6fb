#include <cstdlib>
#include <new>

#include "common/scratch.h"

namespace effops {
namespace {

constexpr size_t kStays = size_t(32) << 20;

}  // namespace

Workspace::Workspace(size_t bytes) : own_(bytes > kStays) {
  data_ = own_ ? std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096) : thread_scratch(Scratch::call, bytes);
  if (own_ && data_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() {
  if (own_) std::free(data_);
}

}  // namespace effops
