#include "simt/named_barriers.h"

#include "simt/block.h"

namespace effops::device::simt {
namespace {

void release(Block& b, NamedBarriers::Barrier& barrier, const Warp& last) {
  for (int w = 0; w < b.warp_count; ++w) {
    if (!(barrier.waiting >> w & 1)) continue;
    b.shadow.clocks.acquire(w, barrier.seen);
    if (w != last.index) b.make_ready(b.warps[w], b.warps[w].existing);
  }
  barrier = {};
}

// detail: id, threads, and whether to wait. Returns whether the warp goes on at once.
bool execute(Block& b, Warp& w, uint32_t, int64_t detail) {
  const int id = static_cast<int>(detail & 0xff), threads = static_cast<int>(detail >> 8 & 0xffff);
  const bool wait = detail >> 24;
  NamedBarriers::Barrier& barrier = b.named.barriers[id];
  Lane& self = *current_lane;
  if (barrier.arrived > 0 && barrier.expected != threads)
    b.fail(self, self.site, "named barrier %d of %d threads, and others meet there as %d", id, threads,
           barrier.expected);
  if (barrier.warps >> w.index & 1) b.fail(self, self.site, "named barrier %d: the warp has arrived there already", id);
  barrier.warps |= 1u << w.index;
  barrier.expected = threads;
  barrier.arrived += kLanes;
  b.shadow.clocks.release(w.index, barrier.seen);
  if (wait) barrier.waiting |= 1u << w.index;
  const bool complete = barrier.arrived >= threads;
  if (complete) release(b, barrier, w);
  if (wait && !complete)
    for (int i = 0; i < kLanes; ++i) b.lane(w, i).wait = Lane::Wait::named;
  return complete || !wait;
}

const WarpOperation kNamedBarrier{"a named barrier", execute, true};

}  // namespace

void named_barrier(int id, int threads, bool wait) {
  const void* site = __builtin_return_address(0);
  Lane& self = *current_lane;
  if (id < 1 || id >= NamedBarriers::kCount || threads < kLanes || threads % kLanes || threads > kMostThreads)
    self.block->fail(self, site, "named barrier %d of %d threads: expected an id of 1 to 15 and a multiple of 32", id,
                     threads);
  meet(~0u, kNamedBarrier, id | int64_t(threads) << 8 | int64_t(wait) << 24, nullptr, site);
}

}  // namespace effops::device::simt
