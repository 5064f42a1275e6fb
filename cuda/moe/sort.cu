// Sorting of slots by expert: one block where slots are few, four kernels otherwise.
#include "moe/moe.h"
#include "moe/slot_sort.h"
#include "primitives/element.h"

namespace effops::device {
namespace {

constexpr int64_t kFewSlots = 4096;
constexpr int kMostThreads = 1024, kThreads = 128;
constexpr int64_t kUnitSlots = 256, kMostUnits = 4096, kMostCounts = 1 << 22;
constexpr int64_t kMostShared = 96 * 1024, kScratchBytes = kWarp * sizeof(int32_t);

__global__ void __launch_bounds__(kMostThreads) sort_few(const __grid_constant__ SlotSortParams a) {
  int32_t* const scratch = reinterpret_cast<int32_t*>(shared_memory());
  int32_t* const counts = a.counts ? a.counts : scratch + kWarp;
  const SlotSort sort(a, counts, counts + int64_t(a.units) * a.buckets());
  if (warp_index() < a.units) sort.count(warp_index());
  __syncthreads();
  for (int bucket = threadIdx.x; bucket < a.buckets(); bucket += blockDim.x) sort.sum_units_alone(bucket);
  __syncthreads();
  sort.sum_buckets(scratch);
  if (warp_index() < a.units) sort.place(warp_index());
}

__device__ int first_warp() { return blockIdx.x * (blockDim.x / kWarp) + warp_index(); }
__device__ int warp_step() { return gridDim.x * (blockDim.x / kWarp); }

__global__ void __launch_bounds__(kThreads) count_slots(const __grid_constant__ SlotSortParams a) {
  for (int unit = first_warp(); unit < a.units; unit += warp_step()) SlotSort(a, a.counts, a.starts).count(unit);
}
__global__ void __launch_bounds__(kThreads) sum_slots(const __grid_constant__ SlotSortParams a) {
  for (int b = first_warp(); b < a.buckets(); b += warp_step()) SlotSort(a, a.counts, a.starts).sum_units(b);
}
__global__ void __launch_bounds__(kMostThreads) sum_buckets(const __grid_constant__ SlotSortParams a) {
  SlotSort(a, a.counts, a.starts).sum_buckets(reinterpret_cast<int32_t*>(shared_memory()));
}
__global__ void __launch_bounds__(kThreads) place_slots(const __grid_constant__ SlotSortParams a) {
  for (int unit = first_warp(); unit < a.units; unit += warp_step()) SlotSort(a, a.counts, a.starts).place(unit);
}

SlotSortParams params_of(const SlotSortProblem& p) {
  SlotSortParams a;
  a.p = p;
  a.k = FastDivide(static_cast<uint32_t>(max_of<int64_t>(p.k, 1)));
  while (a.buckets() >> a.bits) ++a.bits;
  const int64_t most =
      p.slots() <= kFewSlots ? kMostThreads / kWarp : clamp_to<int64_t>(kMostCounts / a.buckets(), kWarp, kMostUnits);
  const int64_t least = p.slots() <= kFewSlots ? kWarp : kUnitSlots;
  const int64_t own = max_of((p.slots() + most - 1) / most, least);
  a.unit_slots = (own + kWarp - 1) / kWarp * kWarp;
  a.units = static_cast<int>((p.slots() + a.unit_slots - 1) / a.unit_slots);
  return a;
}

int64_t count_bytes(const SlotSortParams& a) {
  return (int64_t(a.units) + 1) * a.buckets() * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace

int64_t sort_slots_workspace(const SlotSortProblem& p) {
  const SlotSortParams a = params_of(p);
  return p.slots() <= kFewSlots && count_bytes(a) + kScratchBytes <= kMostShared ? 0 : count_bytes(a);
}

int sort_slots(const SlotSortProblem& p, void* workspace, void* stream) {
  if (p.experts == 0 && p.slots() == 0) return 0;
  SlotSortParams a = params_of(p);
  if (sort_slots_workspace(p) > 0) {
    a.counts = static_cast<int32_t*>(workspace);
    a.starts = a.counts + int64_t(a.units) * a.buckets();
  }
  if (p.slots() <= kFewSlots) {
    const int threads = threads_for(max_of(a.units * kWarp, a.buckets()), kMostThreads);
    return launch<SlotSortParams>({"sort_few", 1, threads, kScratchBytes + (a.counts ? 0 : count_bytes(a)), stream},
                                  &sort_few, a);
  }
  const auto by_warp = [&](const char* name, void (*kernel)(SlotSortParams), int64_t count) {
    const dim3 grid = stride_grid((count + kThreads / kWarp - 1) / (kThreads / kWarp));
    return launch<SlotSortParams>({name, grid, kThreads, 0, stream}, kernel, a);
  };
  if (const int status = by_warp("count_slots", &count_slots, a.units)) return status;
  if (const int status = by_warp("sum_slots", &sum_slots, a.buckets())) return status;
  const int threads = threads_for(a.buckets(), kMostThreads);
  if (const int status = launch<SlotSortParams>({"sum_buckets", 1, threads, kScratchBytes, stream}, &sum_buckets, a))
    return status;
  return by_warp("place_slots", &place_slots, a.units);
}

}  // namespace effops::device
