// The global memory that a launch on the host machine may touch.
#pragma once

#include <cstdint>

namespace effops::device::simt {

struct Extent {
  const char* name;  // for reports
  const void* data;
  int64_t bytes;
  bool writable;
};

}  // namespace effops::device::simt

// Holds for the calling thread's launches until its next call; none: anything may be touched.
extern "C" __attribute__((visibility("default"))) void effops_simt_extents(const effops::device::simt::Extent* extents,
                                                                           int64_t count);
// Of the ldmatrix operations of the calling thread's last launch: rows that had to wait for another in the same bank.
extern "C" __attribute__((visibility("default"))) int64_t effops_simt_bank_conflicts();
// What went wrong in the calling thread's last launch; "" for nothing.
extern "C" __attribute__((visibility("default"))) const char* effops_simt_report();
