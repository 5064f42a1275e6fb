// Kernels written in place, as lambdas that capture by value what a kernel gets as parameters.
#pragma once

#include <cstdlib>
#include <vector>

#include "cpp/check.h"
#include "primitives/platform.h"
#include "primitives/shared_memory.h"

namespace effops::test {

namespace simt = device::simt;

struct Shape {
  dim3 grid;
  int threads;
  int64_t shared = 0;
};

// What was wrong, or "".
template <class Body>
std::string report_of(Shape s, const Body& body) {
  const int status = simt::launch("tested", s.grid, s.threads, s.shared, body);
  const std::string text = simt::last_report();
  CHECK((status == 0) == text.empty(), status, " ", text);
  return text;
}

template <class Body>
void run(Shape s, const Body& body) {
  const std::string text = report_of(s, body);
  CHECK(text.empty(), text);
}

// An array of global memory that kernels may use past the lifetime of nothing: plain heap, exact size.
template <class T>
class Global {
 public:
  explicit Global(size_t count, T value = T{}) : items_(count, value) {}
  explicit Global(std::vector<T> items) : items_(std::move(items)) {}
  T* get() { return items_.data(); }
  T& operator[](size_t i) { return items_[i]; }
  size_t size() const { return items_.size(); }

 private:
  std::vector<T> items_;
};

}  // namespace effops::test
