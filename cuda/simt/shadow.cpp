#include "simt/shadow.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "simt/block.h"

namespace effops::device::simt {
namespace {

constexpr int kWriter = 0;

}  // namespace

// One access, unit by unit.
template <Access kKind>
struct Shadow::Visit {
  Lane& lane;
  const Clocks& clocks;
  const void* site;
  int64_t offset;
  int64_t bytes;
  uint32_t now = clocks.now(lane.warp->index);
  uint32_t near_site = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site) - lane.block->grid->module->base);

  static constexpr const char* kName = kKind == Access::read         ? "read"
                                       : kKind == Access::atomic     ? "atomic access"
                                       : kKind == Access::copy_issue ? "cp.async write"
                                                                     : "write";

  void apply(Cell& c) const {
    if constexpr (kKind == Access::copy_landing) {
      set(c, kWriter);
      c.in_flight = false;
      return;
    }
    const bool written = c.clock[kWriter] >= clocks.block_start();
    if (written && c.in_flight) fail_in_flight(c);
    if constexpr (kKind == Access::read || kKind == Access::atomic)
      if (!written) fail_uninitialised();
    if (!known(c, kWriter) && !(kKind == Access::atomic && c.atomic)) fail_race(c, kWriter);
    if constexpr (kKind == Access::read) return remember_reader(c);
    for (int role : {1, 2})
      if (!known(c, role)) fail_race(c, role);
    set(c, kWriter);
    c.clock[1] = c.clock[2] = 0;
    c.in_flight = kKind == Access::copy_issue;
    c.atomic = kKind == Access::atomic;
  }

 private:
  // Has something ordered what this role tells before this access?
  bool known(const Cell& c, int role) const { return clocks.ordered(c.thread[role], c.clock[role], lane.thread); }
  void set(Cell& c, int role) const {
    c.clock[role] = now;
    c.site[role] = near_site;
    c.thread[role] = static_cast<uint16_t>(lane.thread);
  }
  // Of readers that nothing has ordered before this one two different ones are kept, of different warps if there are.
  void remember_reader(Cell& c) const {
    const int first = c.thread[1] / kLanes;
    if (known(c, 1)) set(c, 1);
    else if (known(c, 2) || (c.thread[2] / kLanes == first && lane.thread / kLanes != first)) set(c, 2);
  }

  const void* site_of(const Cell& c, int role) const {
    return reinterpret_cast<const void*>(lane.block->grid->module->base + c.site[role]);
  }
  [[noreturn, gnu::noinline]] void fail_uninitialised() const {
    lane.block->fail(lane, site, "%s of %lld uninitialised bytes at offset %lld of shared memory", kName,
                     static_cast<long long>(bytes), static_cast<long long>(offset));
  }
  [[noreturn, gnu::noinline]] void fail_in_flight(const Cell& c) const {
    lane.block->fault.other = site_of(c, kWriter);
    lane.block->fail(lane, site,
                     "%s of %lld bytes at offset %lld of shared memory before wait_group: a cp.async of thread %d is "
                     "under way there",
                     kName, static_cast<long long>(bytes), static_cast<long long>(offset), c.thread[kWriter]);
  }
  [[noreturn, gnu::noinline]] void fail_race(const Cell& c, int role) const {
    const char* before = role != kWriter ? "a read" : c.atomic ? "an atomic access" : "a write";
    lane.block->fault.other = site_of(c, role);
    lane.block->fail(lane, site,
                     "race: %s of %lld bytes at offset %lld of shared memory, and %s by thread %d; no %s between",
                     kName, static_cast<long long>(bytes), static_cast<long long>(offset), before, c.thread[role],
                     c.thread[role] / kLanes == lane.thread / kLanes ? "__syncwarp or barrier" : "barrier");
  }
};

void Shadow::begin_block(int warps) {
  constexpr int64_t kChunks = kMostShared / kChunk;
  if (!chunks_ || clocks.near_overflow()) {
    clocks = {};
    chunks_.reset(new Cell[kChunks]());
    units_.reset(new Cell[kMostShared]());
    unit_bytes_.reset(new uint8_t[kChunks]);
    std::memset(unit_bytes_.get(), kChunk, kChunks);
  }
  clocks.begin_block(warps);
}

void Shadow::refine(int64_t chunk, int unit) {
  const int before = unit_bytes_[chunk];
  for (int i = kChunk - unit; i >= 0; i -= unit)
    cell(chunk * kChunk + i, unit) = cell(chunk * kChunk + i / before * before, before);
  unit_bytes_[chunk] = static_cast<uint8_t>(unit);
}

template <Access kKind>
void Shadow::visit_all(const Visit<kKind>& visit) {
  int64_t offset = visit.offset, left = visit.bytes;
  while (left > 0) {
    const int64_t chunk = offset / kChunk;
    const int within = static_cast<int>(offset % kChunk), here = static_cast<int>(std::min(kChunk - within, left));
    const int unit = 1 << std::countr_zero(static_cast<unsigned>(within | here));
    if (unit_bytes_[chunk] > unit) refine(chunk, unit);
    const int step = unit_bytes_[chunk];
    for (int i = within; i < within + here; i += step) visit.apply(cell(chunk * kChunk + i, step));
    if (kKind != Access::read && here == kChunk && step < kChunk) {
      unit_bytes_[chunk] = kChunk;
      chunks_[chunk] = units_[chunk * kChunk];
    }
    offset += here;
    left -= here;
  }
}

void Shadow::access(Lane& lane, int64_t offset, int64_t bytes, Access kind, const void* site) {
  switch (kind) {
    case Access::read:
      return visit_all<Access::read>({lane, clocks, site, offset, bytes});
    case Access::write:
      return visit_all<Access::write>({lane, clocks, site, offset, bytes});
    case Access::atomic:
      return visit_all<Access::atomic>({lane, clocks, site, offset, bytes});
    case Access::copy_issue:
      return visit_all<Access::copy_issue>({lane, clocks, site, offset, bytes});
    case Access::copy_landing:
      return visit_all<Access::copy_landing>({lane, clocks, site, offset, bytes});
  }
}

}  // namespace effops::device::simt
