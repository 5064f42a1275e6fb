// The tiles of all groups, one after the other, of which a block takes every gridDim.x-th. Each warp looks for itself,
// 32 groups at a time: no memory is shared and nobody waits.
#pragma once

#include "moe/group_rows.h"
#include "moe/grouped_params.h"

namespace effops::device {

struct GroupTile {
  int row = 0;   // the first
  int rows = 0;  // that exist
  int group = 0;
  int feature = 0;  // the first, of y
  int depth = 0;    // input features to add up
  int limit = 0;    // features of w that the group has
};

template <int kRows, int kColumns>
class GroupedWalk {
 public:
  __device__ explicit GroupedWalk(const GroupedParams& a) : a_(a), tile_(blockIdx.x) {
    if (a_.p.groups > 0) look();
  }

  // The block's next tile; false: there is none.
  __device__ bool next(GroupTile& to) {
    if (a_.p.groups == 0) return false;
    while (true) {
      const uint32_t here = __shfl_sync(kAllLanes, up_to_, kWarp - 1);
      if (tile_ < here) break;
      first_ += kWarp;
      if (first_ >= a_.p.groups) return false;
      before_ = here;
      look();
    }
    const int lane = __ffs(__ballot_sync(kAllLanes, tile_ < up_to_)) - 1;
    const int begin = __shfl_sync(kAllLanes, begin_, lane), end = __shfl_sync(kAllLanes, end_, lane);
    const uint32_t lower = __shfl_sync(kAllLanes, up_to_, lane > 0 ? lane - 1 : 0);
    to.group = first_ + lane;
    place(to, tile_ - (lane > 0 ? lower : before_), begin, end);
    tile_ += gridDim.x;
    return true;
  }

  // The end of all groups, once there is no next tile.
  __device__ int end() const { return __shfl_sync(kAllLanes, end_, kWarp - 1); }

 private:
  static constexpr uint32_t kBand = 16;  // row tiles whose rows stay in the cache while all columns pass

  __device__ static uint32_t row_tiles(int begin, int end) {
    return static_cast<uint32_t>(end - begin + kRows - 1) / kRows;
  }

  // The rows and tiles of the next 32 groups. Groups begin where all before have ended, whatever the offsets are: two
  // never share a row, and there are no more tiles than the launch was planned for.
  __device__ void look() {
    const int group = first_ + lane_index(), rows = static_cast<int>(a_.p.rows), ended = end();
    end_ = group < a_.p.groups ? clamp_to(a_.p.offsets[group], ended, rows) : ended;
    EFFOPS_UNROLL
    for (int step = 1; step < kWarp; step *= 2) end_ = max_of(end_, __shfl_up_sync(kAllLanes, end_, step));
    begin_ = __shfl_up_sync(kAllLanes, end_, 1);
    if (lane_index() == 0) begin_ = ended;
    up_to_ = row_tiles(begin_, end_) * a_.column_tiles;
    EFFOPS_UNROLL
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t lower = __shfl_up_sync(kAllLanes, up_to_, step);
      if (lane_index() >= step) up_to_ += lower;
    }
    up_to_ += before_;
  }

  __device__ void place(GroupTile& to, uint32_t i, int begin, int end) const {
    const uint32_t columns = static_cast<uint32_t>(a_.column_tiles), band = i / (kBand * columns);
    const uint32_t in_band = i - band * kBand * columns, height = min_of(kBand, row_tiles(begin, end) - band * kBand);
    const uint32_t row_tile = band * kBand + in_band % height, column = in_band / height;
    to.row = begin + static_cast<int>(row_tile) * kRows;
    to.rows = min_of(kRows, end - to.row);
    to.feature = static_cast<int>(column) * (a_.pairing == Pairing::none ? kColumns : kColumns / 2);
    to.limit = group_size(a_.p.out_sizes, to.group, a_.p.out);
    to.depth = to.feature < to.limit ? group_size(a_.p.in_sizes, to.group, a_.p.in) : 0;
  }

  const GroupedParams& a_;
  uint32_t tile_, before_ = 0;  // before_: tiles before the 32 groups at hand
  int first_ = 0;               // of these groups
  uint32_t up_to_ = 0;          // this lane's group: tiles up to and with it
  int begin_ = 0, end_ = 0;     // and its rows
};

}  // namespace effops::device
