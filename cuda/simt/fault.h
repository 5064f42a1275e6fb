// What ended a block.
#pragma once

#include <cstdint>

#include "simt/language.h"

namespace effops::device::simt {

struct Fault {
  bool happened = false;
  uint3 block{};
  int64_t linear = 0;
  int thread = 0;
  const void* site = nullptr;   // a return address
  const void* other = nullptr;  // of the access before, if there are two
  char text[768] = "";
};

}  // namespace effops::device::simt
