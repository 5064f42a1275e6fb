#include "simt/rendezvous.h"

#include <bit>

#include "simt/block.h"

namespace effops::device::simt {
namespace {

WarpGroup& group_of(Lane& self, uint32_t mask, const WarpOperation& operation, int64_t detail, const void* site) {
  Block& b = *self.block;
  Warp& w = *self.warp;
  if (!(mask & self.bit())) b.fail(self, site, "%s: its own lane is not in the mask 0x%08x", operation.name, mask);
  if (operation.whole_warp && w.existing != ~0u)
    b.fail(self, site, "%s needs all 32 lanes of a warp, and this one has %d", operation.name,
           std::popcount(w.existing));
  if (mask & w.exited)
    b.fail(self, site, "%s: lane %d, which the mask 0x%08x names, has exited", operation.name,
           std::countr_zero(mask & w.exited), mask);
  for (int i = 0; i < w.groups; ++i) {
    WarpGroup& g = w.group[i];
    if (g.mask != mask) continue;
    if (g.operation != &operation || g.detail != detail) {
      b.fault.other = g.site;
      b.fail(self, site, "unequal operations of one warp: %s (0x%llx) here, and lane %d waits in %s (0x%llx)",
             operation.name, static_cast<unsigned long long>(detail), std::countr_zero(g.arrived), g.operation->name,
             static_cast<unsigned long long>(g.detail));
    }
    return g;
  }
  return w.group[w.groups++] = {mask, 0, &operation, detail, site};
}

}  // namespace

void meet(uint32_t mask, const WarpOperation& operation, int64_t detail, void* operands, const void* site) {
  Lane& self = *current_lane;
  Block& b = *self.block;
  Warp& w = *self.warp;
  mask &= w.existing;
  self.site = site;
  WarpGroup& g = group_of(self, mask, operation, detail, site);
  w.operands[self.index] = operands;
  g.arrived |= self.bit();
  if (g.arrived != mask) {
    self.wait = Lane::Wait::warp;
    b.park(self);
    self.wait = Lane::Wait::nothing;
    return;
  }
  g = w.group[--w.groups];
  if (mask == w.existing) b.count_conflicts(w);
  if (operation.execute(b, w, mask, detail)) {
    b.make_ready(w, mask & ~self.bit());
    b.after_release(self);
  } else {
    b.park(self);
    self.wait = Lane::Wait::nothing;
  }
}

void check_exit(const Lane& self) {
  Block& b = *self.block;
  for (int i = 0; i < self.warp->groups; ++i) {
    const WarpGroup& g = self.warp->group[i];
    if (!(g.mask & self.bit())) continue;
    b.fault.other = g.site;
    b.fail(self, nullptr, "exits, while lane %d waits for it in %s of the mask 0x%08x", std::countr_zero(g.arrived),
           g.operation->name, g.mask);
  }
  if (b.barrier.arrived > 0) {
    b.fault.other = b.barrier.site;
    b.fail(self, nullptr, "exits, while %d of %d threads wait at __syncthreads (%s:%d)", b.barrier.arrived, b.threads,
           b.barrier.file, b.barrier.line);
  }
}

}  // namespace effops::device::simt
