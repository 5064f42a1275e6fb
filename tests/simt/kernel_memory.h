// Memory of a kernel's call at its exact size: accesses outside and writes to inputs are reported.
#pragma once

#include <cstring>

#include "planted.h"
#include "primitives/element.h"

namespace effops::test {

// Elements at a distance of `shift` elements from a 64-byte boundary, NaN (or, of integers, -1) where nothing is set.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0, int shift = 0)
      : bytes_(count * sizeof(T)), memory_(bytes_ + shift * sizeof(T) + 64, '\xff') {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<T*>((at + 63) / 64 * 64) + shift;
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;

  T* get() const { return count() ? data_ : nullptr; }
  char* raw() const { return reinterpret_cast<char*>(get()); }
  int64_t count() const { return bytes_ / int64_t(sizeof(T)); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  void set(int64_t i, double value) { data_[i] = device::narrow<T>(static_cast<device::Compute<T>>(value)); }
  double value(int64_t i) const { return device::widen(data_[i]); }
  void fill(const std::vector<T>& values) { std::copy(values.begin(), values.end(), data_); }

  simt::Extent extent(const char* name, bool writable = false) const { return {name, get(), bytes_, writable}; }

 private:
  int64_t bytes_;
  std::vector<char> memory_;
  T* data_;
};

class Integers {  // from `low` to `high`, repeatable
 public:
  explicit Integers(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  int operator()(int low, int high) {
    state_ = state_ * 1664525u + 1013904223u;
    return low + static_cast<int>((state_ >> 8) % static_cast<uint32_t>(high - low + 1));
  }

 private:
  uint32_t state_;
};

// The launch has no report, with nothing but these extents.
template <class Start>
void run_within(std::vector<simt::Extent> extents, const std::string& what, Start&& start) {
  const Extents allowed(std::move(extents));
  const int status = start();
  CHECK(status == 0, what, ": status ", status, " ", simt::last_report());
}

}  // namespace effops::test
