// A stable counting sort of slots by expert. Units, a warp each, count their consecutive slots by bucket (an expert, or
// the last one for what is dropped); sums over units and buckets say where each unit's slots of a bucket begin; units
// write their slots there, in order. No atomics: slots that meet in a warp are ranked by votes.
#pragma once

#include "common/host_device.h"
#include "common/moe_problem.h"
#include "primitives/divide.h"
#include "primitives/reduce.h"

namespace effops::device {

struct SlotSortParams {
  SlotSortProblem p;
  FastDivide k;
  int units = 0;
  int64_t unit_slots = 0;     // a multiple of a warp's
  int bits = 0;               // of a bucket's number, and of one more
  int32_t* counts = nullptr;  // [units, buckets]; null: in shared memory
  int32_t* starts = nullptr;  // [buckets], behind the counts

  EFFOPS_HD int buckets() const { return static_cast<int>(p.experts) + 1; }
};

// The sum of lower lanes' x.
__device__ inline int32_t sum_below(int32_t x) {
  int32_t sum = x;
  EFFOPS_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t lower = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_index() >= step) sum += lower;
  }
  return sum - x;
}

class SlotSort {
 public:
  __device__ SlotSort(const SlotSortParams& a, int32_t* counts, int32_t* starts)
      : a_(a), counts_(counts), starts_(starts) {}

  __device__ void count(int unit) const {
    int32_t* const own = counts_ + int64_t(unit) * a_.buckets();
    for (int i = lane_index(); i < a_.buckets(); i += kWarp) own[i] = 0;
    __syncwarp();
    each_round(unit, [&](int64_t, int bucket, unsigned peers) {
      if (first_of(peers) && bucket < a_.buckets()) own[bucket] += __popc(peers);
      __syncwarp();
    });
  }

  // Counts of a bucket to sums over the units before; the bucket's own sum to `starts`.
  __device__ void sum_units_alone(int bucket) const {
    int32_t sum = 0;
    for (int unit = 0; unit < a_.units; ++unit) sum += replace(unit, bucket, sum);
    starts_[bucket] = sum;
  }
  __device__ void sum_units(int bucket) const {  // by a warp
    int32_t sum = 0;
    for (int first = 0; first < a_.units; first += kWarp) {
      const int unit = first + lane_index();
      const int32_t own = unit < a_.units ? counts_[int64_t(unit) * a_.buckets() + bucket] : 0;
      const int32_t below = sum_below(own);
      if (unit < a_.units) replace(unit, bucket, sum + below);
      sum += __shfl_sync(kAllLanes, below + own, kWarp - 1);
    }
    if (lane_index() == 0) starts_[bucket] = sum;
  }

  // Sums of buckets to their starts and the experts' ends, by a block. `scratch`: 32 items of shared memory.
  __device__ void sum_buckets(int32_t* scratch) const {
    const int warps = blockDim.x / kWarp;
    int32_t before = 0;
    for (int first = 0; first < a_.buckets(); first += blockDim.x) {
      const int bucket = first + threadIdx.x;
      const int32_t own = bucket < a_.buckets() ? starts_[bucket] : 0;
      const int32_t below = sum_below(own);
      if (lane_index() == kWarp - 1) scratch[warp_index()] = below + own;
      __syncthreads();
      const int32_t of_warp = lane_index() < warps ? scratch[lane_index()] : 0;
      const int32_t start =
          before + below + reduce_lanes<kWarp>(lane_index() < static_cast<int>(warp_index()) ? of_warp : 0, Sum());
      before += reduce_lanes<kWarp>(of_warp, Sum());
      if (bucket < a_.buckets()) starts_[bucket] = start;
      if (bucket < a_.p.experts) a_.p.offsets[bucket] = start + own;
      __syncthreads();
    }
  }

  __device__ void place(int unit) const {
    int32_t* const own = counts_ + int64_t(unit) * a_.buckets();
    each_round(unit, [&](int64_t slot, int bucket, unsigned peers) {
      const bool given = bucket < a_.buckets();
      const int32_t before = given ? own[bucket] : 0;
      __syncwarp();
      if (given && first_of(peers)) own[bucket] = before + __popc(peers);
      __syncwarp();
      if (!given) return;
      const int32_t at = starts_[bucket] + before + __popc(peers & ((1u << lane_index()) - 1));
      a_.p.order[at] = static_cast<int32_t>(slot);
      a_.p.inverse[slot] = bucket < a_.p.experts ? at : -1;
    });
  }

 private:
  __device__ static bool first_of(unsigned peers) { return __ffs(peers) - 1 == lane_index(); }

  __device__ int32_t replace(int unit, int bucket, int32_t by) const {
    int32_t& count = counts_[int64_t(unit) * a_.buckets() + bucket];
    const int32_t before = count;
    count = by;
    return before;
  }

  __device__ int bucket_of(int64_t slot) const {
    const uint32_t token = a_.k.quotient(static_cast<uint32_t>(slot));
    const int64_t id = a_.p.ids[token * a_.p.token + (slot - int64_t(token) * a_.p.k) * a_.p.choice];
    return id < 0 || id >= a_.p.experts ? static_cast<int>(a_.p.experts) : static_cast<int>(id);
  }

  // round(slot, bucket, lanes of the same bucket); behind the last slot the bucket is one too many.
  template <class Round>
  __device__ void each_round(int unit, Round&& round) const {
    const int64_t begin = unit * a_.unit_slots, end = min_of(begin + a_.unit_slots, a_.p.slots());
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t slot = first + lane_index();
      const int bucket = slot < end ? bucket_of(slot) : a_.buckets();
      unsigned peers = kAllLanes;
      for (int bit = 0; bit < a_.bits; ++bit) {
        const unsigned set = __ballot_sync(kAllLanes, bucket >> bit & 1);
        peers &= bucket >> bit & 1 ? set : ~set;
      }
      round(slot, bucket, peers);
    }
  }

  const SlotSortParams& a_;
  int32_t *counts_, *starts_;
};

}  // namespace effops::device
