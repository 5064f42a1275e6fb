#include "simt/copies.h"

#include <cstring>

#include "simt/block.h"
#include "simt/memory.h"

namespace effops::device::simt {

void Copies::issue(Lane& self, void* to, const void* from, int bytes, const void* site) {
  Block& b = *self.block;
  if (bytes < 0 || bytes > 16) b.fail(self, site, "cp.async of %d bytes: expected 0 to 16", bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16))
    b.fail(self, site, "misaligned cp.async, from %p to %p: both have to be multiples of 16", from, to);
  const int64_t offset = shared_offset(self, to, 16, "cp.async", site);
  if (b.grid->check && bytes > 0) check_global(self, from, bytes, Access::read, site);
  if (b.grid->track) b.shadow.access(self, offset, 16, Access::copy_issue, site);
  if (b.grid->banks) self.warp->accesses.add(self.index, site, offset, 16);
  Copy c{{}, static_cast<uint32_t>(offset), groups_, site};
  if (bytes > 0) std::memcpy(c.data, from, bytes);
  std::memset(to, 0xff, 16);
  copies_.push_back(c);
}

void Copies::wait(Lane& self, int pending, const void* site) {
  Block& b = *self.block;
  for (; landed_ < copies_.size() && copies_[landed_].group < groups_ - pending; ++landed_) {
    const Copy& c = copies_[landed_];
    if (b.grid->track) b.shadow.access(self, c.to, 16, Access::copy_landing, site);
    std::memcpy(b.shared.begin() + c.to, c.data, 16);
  }
  if (landed_ == copies_.size()) {
    copies_.clear();
    landed_ = 0;
  }
}

void Copies::check_finished(const Lane& self) const {
  if (landed_ < copies_.size())
    self.block->fail(self, copies_[landed_].site, "exits without having waited for this cp.async");
}

void copy_async(void* to, const void* from, int bytes) {
  current_lane->copies.issue(*current_lane, to, from, bytes, __builtin_return_address(0));
}
void copy_commit() { current_lane->copies.commit(); }
void copy_wait(int pending) { current_lane->copies.wait(*current_lane, pending, __builtin_return_address(0)); }

}  // namespace effops::device::simt
