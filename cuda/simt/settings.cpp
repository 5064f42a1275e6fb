#include "simt/settings.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace effops::device::simt {
namespace {

constexpr int kMostThreads = 16;  // each has up to 1024 stacks, and a process a limited number of mappings

int64_t number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoll(text, nullptr, 10) : otherwise;
}

}  // namespace

Settings current_settings() {
  static const int cores = static_cast<int>(std::thread::hardware_concurrency());
  const char* seed = std::getenv("EFFOPS_SIMT_SEED");
  Settings s;
  s.threads = static_cast<int>(std::clamp<int64_t>(number("EFFOPS_SIMT_THREADS", cores), 1, kMostThreads));
  s.check = number("EFFOPS_SIMT_CHECK", 1) != 0;
  s.banks = number("EFFOPS_SIMT_BANKS", 0) != 0;
  s.shuffled = seed && *seed;
  s.seed = static_cast<uint64_t>(number("EFFOPS_SIMT_SEED", 0));
  return s;
}

}  // namespace effops::device::simt
