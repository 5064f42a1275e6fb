// What the environment asks for.
#pragma once

#include <cstdint>

namespace effops::device::simt {

struct Settings {
  int threads;    // EFFOPS_SIMT_THREADS: operating-system threads that run blocks
  bool check;     // EFFOPS_SIMT_CHECK=0: no checks of memory accesses
  bool banks;     // EFFOPS_SIMT_BANKS=1: bank conflicts of plain accesses count as well as ldmatrix's
  bool shuffled;  // EFFOPS_SIMT_SEED=n: lanes and blocks in a random order
  uint64_t seed;
};

// Read anew for every launch.
Settings current_settings();

}  // namespace effops::device::simt
