// Which keys a block of rows visits, tile by tile: the same on every backend.
#pragma once

#include "common/attention_problem.h"

namespace effops {

inline constexpr int64_t kTileKeys = 64;

// The visited keys of a row block, cut into tiles: at most two intervals (sinks, then the rest).
struct TileList {
  int64_t begin[2] = {0, 0}, end[2] = {0, 0};

  EFFOPS_HD static TileList of(const Visibility& see, Positions of_rows) {
    TileList t;
    const int64_t lo = see.begin_at(of_rows.lowest);
    const int64_t hi = see.end_at(of_rows.highest);
    const int64_t sinks = min_of(see.sinks_end, hi);
    const bool has_sinks = see.window != 0 && sinks > see.start;
    if (has_sinks && lo > sinks) {
      t.begin[0] = see.start;
      t.end[0] = sinks;
      t.begin[1] = lo;
    } else {
      t.begin[1] = has_sinks ? see.start : lo;
    }
    t.end[1] = max_of(hi, t.begin[1]);
    return t;
  }
  EFFOPS_HD static int64_t tiles_in(int64_t begin, int64_t end) { return (end - begin + kTileKeys - 1) / kTileKeys; }
  EFFOPS_HD int64_t count() const { return tiles_in(begin[0], end[0]) + tiles_in(begin[1], end[1]); }
  EFFOPS_HD void tile(int64_t i, int64_t& first, int64_t& keys) const {
    const int64_t head = tiles_in(begin[0], end[0]);
    const int part = i < head ? 0 : 1;
    first = begin[part] + (part ? i - head : i) * kTileKeys;
    keys = min_of(kTileKeys, end[part] - first);
  }
};

}  // namespace effops
