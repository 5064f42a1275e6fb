// __syncthreads. CUDA demands that all threads of a block meet at one and the same.
#include <cstring>

#include "simt/block.h"

namespace effops::device::simt {

void barrier(const char* file, int line) {
  const void* site = __builtin_return_address(0);
  Lane& self = *current_lane;
  Block& b = *self.block;
  BlockBarrier& at = b.barrier;
  if (b.exited > 0)
    b.fail(self, site, "__syncthreads (%s:%d) after %d of %d threads have exited", file, line, b.exited, b.threads);
  if (at.arrived == 0) {
    at.file = file;
    at.line = line;
    at.site = site;
  } else if (at.line != line || std::strcmp(at.file, file) != 0) {
    b.fault.other = at.site;
    b.fail(self, site, "barrier divergence: __syncthreads (%s:%d), and %d threads wait at another (%s:%d)", file, line,
           at.arrived, at.file, at.line);
  }
  self.site = site;
  if (++at.arrived < b.threads) {
    self.wait = Lane::Wait::block;
    b.park(self);
    self.wait = Lane::Wait::nothing;
    return;
  }
  at.arrived = 0;
  b.shadow.sync_block();
  for (int w = 0; w < b.warp_count; ++w) {
    Warp& warp = b.warps[w];
    b.count_conflicts(warp);
    b.make_ready(warp, &warp == self.warp ? warp.existing & ~self.bit() : warp.existing);
  }
  b.after_release(self);
}

}  // namespace effops::device::simt
