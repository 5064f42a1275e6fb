// Where the kernels of an op run: this processor's own, or a library of device kernels (the linked CUDA one, or the
// same kernels on the host, simt).
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cpu/kernels.h"
#include "library.h"
#include "ops/tensor.h"
#include "ops/threads.h"
#include "simt/extents.h"

namespace effops::ops {

using device::DeviceLibrary;

using MemoryExtent = device::simt::Extent;  // what the kernels of a call may touch

// One a call, made before its arguments are looked at. Within another op's call it is that one's.
class Backend {
 public:
  // By the device of the op's first tensor.
  Backend(const char* op, const Tensor& first);
  // Of ops that have no device kernels.
  explicit Backend(const char* op);
  ~Backend() { current_ = outer_; }
  Backend(const Backend&) = delete;

  static Backend* current() { return current_; }

  const DeviceLibrary* device() const { return device_; }  // null: cpu::kernels()
  // Index values are checked in host memory always, in a GPU's where EFFOPS_CHECK=1 asks for it.
  bool checks_values() const { return checks_values_; }
  bool notes_memory() const { return notes_memory_; }
  void note(const MemoryExtent& extent);

  // Runs the kernel of p on the processor or on the device.
  template <class Problem>
  void run(void (*cpu::Kernels::*own)(const Problem&, const Parallel&),
           int (*DeviceLibrary::*launcher)(const Problem&, void* stream), const Problem& p) const {
    device_ ? launch(launcher, p) : (cpu::kernels().*own)(p, torch_threads());
  }

  // Starts a kernel of the device library: launcher(arguments..., stream).
  template <class... Parameters, class... Arguments>
  void launch(int (*DeviceLibrary::*launcher)(Parameters...), const Arguments&... arguments) const {
    require(device_->*launcher != nullptr);
    permit_memory();
    check((device_->*launcher)(arguments..., stream_));
  }
  // The bytes of workspace that a launcher asks for, allocated beside `like` and 256-byte aligned.
  template <class... Parameters, class... Arguments>
  void* workspace(Tensor& memory, const Arg& like, int64_t (*DeviceLibrary::*bytes)(Parameters...),
                  const Arguments&... arguments) const {
    require(device_->*bytes != nullptr);
    return allocate(memory, like, (device_->*bytes)(arguments...));
  }

 private:
  void require(bool there) const;
  void permit_memory() const;
  void check(int status) const;
  static void* allocate(Tensor& memory, const Arg& like, int64_t bytes);

  static thread_local Backend* current_;

  const char* op_;
  Backend* outer_;
  const DeviceLibrary* device_ = nullptr;
  void* stream_ = nullptr;
  bool checks_values_ = true, notes_memory_ = false;
  std::vector<MemoryExtent> memory_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Whether the values of index arguments of the call are to be checked.
inline bool checks_values() { return Backend::current() == nullptr || Backend::current()->checks_values(); }
inline bool on_device() { return Backend::current() != nullptr && Backend::current()->device() != nullptr; }

// Registers kernels for CPU tensors, and in builds with CUDA kernels for CUDA tensors.
#ifdef EFFOPS_CUDA_KERNELS
#define EFFOPS_IMPL_CUDA(implement) \
  STABLE_TORCH_LIBRARY_IMPL(effops, CUDA, m) { implement(m); }
#else
#define EFFOPS_IMPL_CUDA(implement)
#endif
#define EFFOPS_ON_EVERY_BACKEND(m)                                  \
  static void implement_ops(torch::stable::detail::StableLibrary&); \
  STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { implement_ops(m); }   \
  EFFOPS_IMPL_CUDA(implement_ops)                                   \
  static void implement_ops(torch::stable::detail::StableLibrary& m)

}  // namespace effops::ops
