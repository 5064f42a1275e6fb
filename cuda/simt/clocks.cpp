#include "simt/clocks.h"

#include <algorithm>

namespace effops::device::simt {

void Clocks::begin_block(int warps) {
  uint32_t latest = start_;
  for (int w = 0; w < warps_; ++w) latest = std::max(latest, now_[w]);
  warps_ = warps;
  start_ = latest + 1;
  partial_ = false;
  for (int w = 0; w < kWarps; ++w) now_[w] = met_[w] = start_;
  for (int w = 0; w < warps; ++w) std::fill_n(known_[w], kWarps, latest);
}

void Clocks::sync_block() {
  for (int w = 0; w < warps_; ++w) std::copy_n(now_, warps_, known_[w]);
  for (int w = 0; w < warps_; ++w) advance(w);
}

void Clocks::sync_lanes(int warp, uint32_t mask, bool all) {
  if (all) return advance(warp);
  partial_ = true;
  // Accesses up to now are older than the new clock; the mask's lanes, and whom they knew of, know them.
  const uint32_t reached = ++now_[warp];
  uint32_t joined[kLanes] = {};
  auto& lanes = lanes_[warp];
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    for (int j = 0; j < kLanes; ++j) joined[j] = std::max(joined[j], lanes[i][j]);
  }
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) joined[i] = reached;
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) std::copy_n(joined, kLanes, lanes[i]);
}

void Clocks::release(int warp, Row& seen) {
  for (int w = 0; w < warps_; ++w) seen[w] = std::max(seen[w], w == warp ? now_[w] : known_[warp][w]);
  ++now_[warp];
}

void Clocks::acquire(int warp, const Row& seen) {
  for (int w = 0; w < warps_; ++w) known_[warp][w] = std::max(known_[warp][w], seen[w]);
  advance(warp);
}

}  // namespace effops::device::simt
