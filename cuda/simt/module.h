// The program or shared library that holds a kernel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace effops::device::simt {

struct Module {
  struct Range {
    uintptr_t begin, end;
  };
  std::string path;
  uintptr_t base = 0;
  std::vector<Range> constants;  // memory that nobody writes

  bool holds_constant(uintptr_t begin, uintptr_t end) const {
    for (const Range& r : constants)
      if (begin >= r.begin && end <= r.end) return true;
    return false;
  }
};

// Of the code at this address.
const Module& module_of(const void* code);

// "file:line", each function that was inlined there in turn; the address itself where no line is known.
std::string describe_site(const Module& module, const void* return_address);

}  // namespace effops::device::simt
