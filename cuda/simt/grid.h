// What is the same for all blocks of a launch.
#pragma once

#include <string>
#include <vector>

#include "simt/extents.h"
#include "simt/global_shadow.h"
#include "simt/machine.h"
#include "simt/module.h"

namespace effops::device::simt {

struct NamedExtent {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  int64_t place;  // among the bytes of all writable ones
};

// The calling thread's.
struct ExtentList {
  std::vector<NamedExtent> all;
  int64_t writable_bytes = 0;
  GlobalShadow shadow;
};
ExtentList& registered_extents();

struct Grid {
  Kernel kernel;
  const Module* module;
  const std::vector<NamedExtent>* extents;
  GlobalShadow* global_shadow;  // null: races between blocks are not looked for
  bool check;                   // accesses to global memory and the bounds of shared memory
  bool track;                   // races, uninitialised values and copies under way in shared memory
  bool banks;                   // conflicts of plain accesses to shared memory count
  bool shuffled;                // lanes and blocks run in an order drawn from `seed`
  uint64_t seed;

  uint3 block_at(int64_t number) const {
    const dim3& g = kernel.grid;
    return {unsigned(number % g.x), unsigned(number / g.x % g.y), unsigned(number / g.x / g.y)};
  }
};

}  // namespace effops::device::simt
