// Why no thread of a block can go on.
#include <bit>

#include "simt/block.h"

namespace effops::device::simt {
namespace {

const char* wait_name(const Block& b, const Lane& l) {
  switch (l.wait) {
    case Lane::Wait::block:
      return "__syncthreads";
    case Lane::Wait::named:
      return "a named barrier";
    case Lane::Wait::warp:
      for (int i = 0; i < l.warp->groups; ++i)
        if (l.warp->group[i].arrived & l.bit()) return l.warp->group[i].operation->name;
      break;
    case Lane::Wait::nothing:
      break;
  }
  return b.fault.happened ? "" : "nothing";
}

}  // namespace

// The first thread that waits is named, and one that it waits for.
void Block::diagnose() {
  const Lane* waiting = nullptr;
  for (int t = 0; t < threads && !waiting; ++t)
    if (lanes[t]->wait != Lane::Wait::nothing) waiting = lanes[t].get();
  const Lane* other = nullptr;
  if (waiting->wait == Lane::Wait::warp) {
    const Warp& w = *waiting->warp;
    for (int i = 0; i < w.groups; ++i) {
      const WarpGroup& g = w.group[i];
      if (!(g.arrived & waiting->bit())) continue;
      other = &lane(w, std::countr_zero(g.mask & ~g.arrived));
      fault.other = other->site;
      report(*waiting, waiting->site, "%s of the mask 0x%08x never completes: lane %d is missing, it waits at %s",
             g.operation->name, g.mask, other->index, wait_name(*this, *other));
      return;
    }
  }
  int together = 0;
  for (int t = 0; t < threads; ++t) {
    if (lanes[t]->wait == waiting->wait) ++together;
    else if (!other && lanes[t]->wait != Lane::Wait::nothing) other = lanes[t].get();
  }
  fault.other = other ? other->site : nullptr;
  report(*waiting, waiting->site, "barrier divergence: %d of %d threads wait at %s, %d have exited%s%s", together,
         threads, wait_name(*this, *waiting), exited, other ? ", others wait at " : "",
         other ? wait_name(*this, *other) : "");
}

}  // namespace effops::device::simt
