// The tokens that labels say a query attends to most: scores of all tokens into a workspace, then a block a list finds
// the score of the last one that is taken, by radix, and writes the tokens in order.
#include "sampling/select.h"
#include "selection/label_scores.h"
#include "selection/selection.h"

namespace effops::device {
namespace {

constexpr int kScoreThreads = 128, kScoreTokens = 512, kSelectThreads = 512;

struct Params {
  LabelSearchProblem p;
  int64_t tiles;
  float* scores;  // [batch, lists, capacity]
};

__global__ void __launch_bounds__(kScoreThreads) label_scores(const __grid_constant__ Params a) {
  const LabelSearchProblem& p = a.p;
  const int64_t tile = blockIdx.x % a.tiles, i = blockIdx.x / a.tiles, b = i / p.lists();
  const LabelRange r = LabelRange::of(p, b);
  const int64_t first = r.first + tile * kScoreTokens, last = min_of(r.last, first + kScoreTokens);
  if (first >= last || r.free <= 0 || r.free == r.last - r.first) return;
  const ListQuery query(p, b, i % p.lists(), shared_memory());
  for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) a.scores[i * p.capacity + j] = query.score(b, j);
}

// Of the lanes and warps below, how many have their flag; `all` of the block. `scratch`: a place for each warp.
__device__ int flags_below(bool flag, int* scratch, int& all) {
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

__global__ void __launch_bounds__(kSelectThreads) label_select(const __grid_constant__ Params a) {
  const LabelSearchProblem& p = a.p;
  const int64_t i = blockIdx.x, b = i / p.lists();
  const LabelRange r = LabelRange::of(p, b);
  int32_t* const to = p.indices + i * p.count;
  const int64_t sinks = r.first - r.start, taken = sinks + r.free, all = taken + (r.end - r.last);
  for (int64_t n = threadIdx.x; n < p.count; n += blockDim.x) {
    if (n < sinks) to[n] = static_cast<int32_t>(r.start + n);
    else if (n >= all) to[n] = -1;
    else if (n >= taken) to[n] = static_cast<int32_t>(r.last + (n - taken));
    else if (r.free == r.last - r.first) to[n] = static_cast<int32_t>(r.first + (n - sinks));
  }
  if (r.free <= 0 || r.free == r.last - r.first) return;
  const float* const scores = a.scores + i * p.capacity;
  const Edge<float> edge = find_edge<float>(static_cast<Mass>(r.free), Histogram(shared_memory()), [&](auto take) {
    for (int64_t j = r.first + threadIdx.x; j < r.last; j += blockDim.x) take(scores[j], Mass(1));
  });
  int* const scratch = reinterpret_cast<int*>(shared_memory() + Histogram::kSharedBytes);
  int64_t above = 0, equal = 0;  // of the tokens before
  const int64_t ties = static_cast<int64_t>(edge.equals);
  for (int64_t first = r.first; first < r.last; first += blockDim.x) {
    const int64_t j = first + threadIdx.x;
    const OrderBits<float> order = j < r.last ? order_bits(scores[j]) : 0;
    int all_above = 0, all_equal = 0;
    const bool is_above = j < r.last && order > edge.at, is_equal = j < r.last && order == edge.at;
    const int64_t before_above = above + flags_below(is_above, scratch, all_above);
    const int64_t before_equal = equal + flags_below(is_equal, scratch, all_equal);
    if (is_above || (is_equal && before_equal < ties))
      to[sinks + before_above + min_of(before_equal, ties)] = static_cast<int32_t>(j);
    above += all_above;
    equal += all_equal;
  }
}

}  // namespace

int64_t label_search_workspace(const LabelSearchProblem& p) {
  return p.batch * p.lists() * p.capacity * static_cast<int64_t>(sizeof(float));
}

int label_search(const LabelSearchProblem& p, void* workspace, void* stream) {
  Params a{p, (p.capacity + kScoreTokens - 1) / kScoreTokens, static_cast<float*>(workspace)};
  const int64_t lists = p.batch * p.lists();
  const int status = launch<Params>({"label_topk: scores", dim3(static_cast<unsigned>(a.tiles * lists)), kScoreThreads,
                                     ListQuery::shared_bytes(p), stream},
                                    &label_scores, a);
  if (status != 0) return status;
  const int64_t shared = Histogram::kSharedBytes + kWarp * static_cast<int64_t>(sizeof(int));
  return launch<Params>({"label_topk", dim3(static_cast<unsigned>(lists)), kSelectThreads, shared, stream},
                        &label_select, a);
}

}  // namespace effops::device
