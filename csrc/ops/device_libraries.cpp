#include "ops/device_libraries.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

namespace effops::ops {
namespace {

constexpr const char* kSimtLibrary = "libeffops_simt.so";

// EFFOPS_SIMT_LIBRARY, else beside the ops library, else in build/simt of the working directory.
std::string find_simt() {
  const char* given = std::getenv("EFFOPS_SIMT_LIBRARY");
  if (given != nullptr && *given != '\0') return given;
  Dl_info own{};
  dladdr(reinterpret_cast<const void*>(&find_simt), &own);
  const auto beside = std::filesystem::path(own.dli_fname ? own.dli_fname : "").parent_path() / kSimtLibrary;
  const auto built = std::filesystem::path("build/simt") / kSimtLibrary;
  for (const auto& path : {beside, built})
    if (std::filesystem::exists(path)) return std::filesystem::absolute(path);
  fail("EFFOPS_BACKEND=simt: expected ", kSimtLibrary, " at EFFOPS_SIMT_LIBRARY, beside the ops library or in ",
       "build/simt, found none (make simt builds it)");
}

struct Simt {
  const DeviceLibrary* library = nullptr;
  void (*permit)(const MemoryExtent*, int64_t) = nullptr;

  static Simt load() {
    const char* backend = std::getenv("EFFOPS_BACKEND");
    const std::string name = backend == nullptr || *backend == '\0' ? "cpu" : backend;
    if (name == "cpu") return {};
    EFFOPS_CHECK(name == "simt", "EFFOPS_BACKEND: expected cpu or simt, got ", name);
    const std::string path = find_simt();
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    EFFOPS_CHECK(handle != nullptr, "EFFOPS_BACKEND=simt: expected a library that loads, got: ", dlerror());
    const auto table = reinterpret_cast<decltype(&effops_device_library)>(dlsym(handle, "effops_device_library"));
    EFFOPS_CHECK(table != nullptr, "EFFOPS_BACKEND=simt: expected a table of kernels in ", path, ", got none");
    return {table(), reinterpret_cast<void (*)(const MemoryExtent*, int64_t)>(dlsym(handle, "effops_simt_extents"))};
  }
};

const Simt& simt() {
  static const Simt loaded = Simt::load();
  return loaded;
}

}  // namespace

const DeviceLibrary* simt_library() { return simt().library; }

void permit_simt_memory(const MemoryExtent* extents, int64_t count) {
  if (simt().permit != nullptr) simt().permit(extents, count);
}

const DeviceLibrary* cuda_library([[maybe_unused]] const char* op) {
#ifdef EFFOPS_CUDA_KERNELS
  return effops_device_library();
#else
  fail(op, ": expected CPU tensors in this build without CUDA kernels, got others");
#endif
}

// torch's stream getter lives in a library that a CPU build of torch does not have, and that is
// loaded with local scope: a link or weak reference would not find it.
void* current_cuda_stream(const char* op, int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  EFFOPS_CHECK(get != nullptr, op, ": expected a CUDA build of torch, got one without libtorch_cuda");
  void* stream = nullptr;
  EFFOPS_CHECK(get(device, &stream) == 0, op, ": could not get the current stream of device ", device);
  return stream;
}

}  // namespace effops::ops
