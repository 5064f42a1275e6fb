#include "ops/backend.h"

#include <cstdlib>
#include <cstring>

#include "ops/device_libraries.h"

namespace effops::ops {

thread_local Backend* Backend::current_ = nullptr;

namespace {

bool check_is(const char* value) {
  const char* given = std::getenv("EFFOPS_CHECK");
  return given != nullptr && std::strcmp(given, value) == 0;
}

}  // namespace

Backend::Backend(const char* op, const Tensor& first) : op_(op), outer_(current_) {
  if (outer_ != nullptr) {
    device_ = outer_->device_;
    stream_ = outer_->stream_;
    checks_values_ = outer_->checks_values_;
    notes_memory_ = outer_->notes_memory_;
    memory_ = outer_->memory_;
    current_ = this;
    return;
  }
  int32_t type = 0, index = 0;
  aoti_torch_get_device_type(first.get(), &type);
  if (type == aoti_torch_device_type_cpu()) {
    device_ = simt_library();
    notes_memory_ = device_ != nullptr;
    checks_values_ = device_ == nullptr || !check_is("0");
  } else {
    device_ = cuda_library(op);
    aoti_torch_get_device_index(first.get(), &index);
    guard_.emplace(index);
    stream_ = current_cuda_stream(op, index);
    checks_values_ = check_is("1");
  }
  current_ = this;
}

Backend::Backend(const char* op) : op_(op), outer_(current_) { current_ = this; }

void Backend::note(const MemoryExtent& extent) { memory_.push_back(extent); }

void Backend::require(bool there) const {
  EFFOPS_CHECK(there, op_, ": not available on ", device_->name, " in this build");
}

void Backend::permit_memory() const {
  if (notes_memory_) permit_simt_memory(memory_.data(), static_cast<int64_t>(memory_.size()));
}

void Backend::check(int status) const {
  EFFOPS_CHECK(status == 0, op_, ": ", device_->name, ": ", device_->error(status));
}

void* Backend::allocate(Tensor& memory, const Arg& like, int64_t bytes) {
  if (bytes == 0) return nullptr;
  constexpr int64_t kAlign = 256;
  memory = empty({bytes + kAlign}, aoti_torch_dtype_uint8(), like);
  char* data = Arg(like.op, "workspace", memory).mutable_data();
  return data + (kAlign - reinterpret_cast<uintptr_t>(data) % kAlign) % kAlign;
}

}  // namespace effops::ops
