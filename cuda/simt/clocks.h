// Who knows of whose memory accesses: a vector clock for every warp, and within a warp the lanes' own where only some
// of them have met. Clocks only grow, over blocks too, so that nothing has to be cleared between blocks.
#pragma once

#include <cstdint>

namespace effops::device::simt {

class Clocks {
 public:
  static constexpr int kWarps = 32, kLanes = 32;
  using Row = uint32_t[kWarps];

  void begin_block(int warps);
  void sync_block();
  void sync_lanes(int warp, uint32_t mask, bool all);
  // One side and the other of a barrier between some warps.
  void release(int warp, Row& seen);
  void acquire(int warp, const Row& seen);

  uint32_t now(int warp) const { return now_[warp]; }
  uint32_t block_start() const { return start_; }
  bool near_overflow() const { return start_ > 1u << 31; }

  // Does `thread` know of what `earlier` did at `clock`?
  bool ordered(int earlier, uint32_t clock, int thread) const {
    const int of = earlier / kLanes, warp = thread / kLanes;
    if (of != warp) return clock <= known_[warp][of];
    return earlier == thread || clock < met_[warp] || (partial_ && clock < met_lanes(warp, thread, earlier));
  }

 private:
  uint32_t met_lanes(int warp, int thread, int earlier) const {
    return lanes_[warp][thread % kLanes][earlier % kLanes];
  }
  void advance(int warp) { met_[warp] = ++now_[warp]; }

  int warps_ = 0;
  uint32_t start_ = 0;
  bool partial_ = false;  // has some mask of a block not been a whole warp?
  Row now_{}, met_{};     // met_: when all lanes of the warp last met
  Row known_[kWarps]{};
  uint32_t lanes_[kWarps][kLanes][kLanes]{};
};

}  // namespace effops::device::simt
