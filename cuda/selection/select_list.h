// A list by scores in memory: a block finds the score of the last one that is taken, by radix, and writes in order.
#pragma once

#include "common/selection_range.h"
#include "sampling/select.h"

namespace effops::device {

inline constexpr int kSelectThreads = 512;
inline constexpr int64_t kSelectShared = Histogram::kSharedBytes + kWarp * static_cast<int64_t>(sizeof(int));

// Of the lanes and warps below, how many have their flag; `all` of the block. `scratch`: a place for each warp.
__device__ inline int flags_below(bool flag, int* scratch, int& all) {
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  __syncthreads();  // scratch has been read
  if (lane_index() == 0) scratch[warp_index()] = __popc(votes);
  __syncthreads();
  int below = __popc(votes & ((1u << lane_index()) - 1));
  all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w < warp_index()) below += scratch[w];
    all += scratch[w];
  }
  return below;
}

// write(n, x) for every n below `count`: the list's n-th, ascending, -1 after the last. scores[x] is looked at for x in
// [r.first, r.last), and only if r searches. A block of kSelectThreads with kSelectShared bytes, its threads together.
template <class Write>
__device__ void select_list(const SelectionRange& r, const float* scores, int64_t count, Write write) {
  const int64_t sinks = r.first - r.start, taken = sinks + r.free, all = taken + (r.end - r.last);
  for (int64_t n = threadIdx.x; n < count; n += blockDim.x) {
    if (n < sinks) write(n, r.start + n);
    else if (n >= all) write(n, -1);
    else if (n >= taken) write(n, r.last + (n - taken));
    else if (!r.searches()) write(n, r.first + (n - sinks));
  }
  if (!r.searches()) return;
  const Edge<float> edge = find_edge<float>(static_cast<Mass>(r.free), Histogram(shared_memory()), [&](auto take) {
    for (int64_t j = r.first + threadIdx.x; j < r.last; j += blockDim.x) take(scores[j], Mass(1));
  });
  int* const scratch = reinterpret_cast<int*>(shared_memory() + Histogram::kSharedBytes);
  int64_t above = 0, equal = 0;  // of those before
  const int64_t ties = static_cast<int64_t>(edge.equals);
  for (int64_t first = r.first; first < r.last; first += blockDim.x) {
    const int64_t j = first + threadIdx.x;
    const OrderBits<float> order = j < r.last ? order_bits(scores[j]) : 0;
    int all_above = 0, all_equal = 0;
    const bool is_above = j < r.last && order > edge.at, is_equal = j < r.last && order == edge.at;
    const int64_t before_above = above + flags_below(is_above, scratch, all_above);
    const int64_t before_equal = equal + flags_below(is_equal, scratch, all_equal);
    if (is_above || (is_equal && before_equal < ties)) write(sinks + before_above + min_of(before_equal, ties), j);
    above += all_above;
    equal += all_equal;
  }
}

}  // namespace effops::device
