// bar.sync and bar.arrive of a block, in whole warps.
#pragma once

#include <cstdint>

#include "simt/clocks.h"

namespace effops::device::simt {

struct Block;

struct NamedBarriers {
  static constexpr int kCount = 16;
  struct Barrier {
    int expected = 0, arrived = 0;    // threads
    uint32_t warps = 0, waiting = 0;  // that have arrived; of them those that wait
    Clocks::Row seen{};               // what those that arrived have done
  };
  Barrier barriers[kCount];

  void reset() {
    for (Barrier& b : barriers) b = {};
  }
};

}  // namespace effops::device::simt
