// The tokens that labels say a query attends to most: scores of all tokens into a workspace, then a block a list finds
// the score of the last one that is taken, by radix, and writes the tokens in order.
#include "selection/label_scores.h"
#include "selection/select_list.h"
#include "selection/selection.h"

namespace effops::device {
namespace {

constexpr int kScoreThreads = 128, kScoreTokens = 512;

struct Params {
  LabelSearchProblem p;
  int64_t tiles;
  float* scores;  // [batch, lists, capacity]
};

__global__ void __launch_bounds__(kScoreThreads) label_scores(const __grid_constant__ Params a) {
  const LabelSearchProblem& p = a.p;
  const int64_t tile = blockIdx.x % a.tiles, i = blockIdx.x / a.tiles, b = i / p.lists();
  const SelectionRange r = range_of(p, b);
  const int64_t first = r.first + tile * kScoreTokens, last = min_of(r.last, first + kScoreTokens);
  if (first >= last || !r.searches()) return;
  const ListQuery query(p, b, i % p.lists(), shared_memory());
  for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) a.scores[i * p.capacity + j] = query.score(b, j);
}

__global__ void __launch_bounds__(kSelectThreads) label_select(const __grid_constant__ Params a) {
  const LabelSearchProblem& p = a.p;
  const int64_t i = blockIdx.x;
  int32_t* const to = p.indices + i * p.count;
  select_list(range_of(p, i / p.lists()), a.scores + i * p.capacity, p.count,
              [&](int64_t n, int64_t token) { to[n] = static_cast<int32_t>(token); });
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
  return launch<Params>({"label_topk", dim3(static_cast<unsigned>(lists)), kSelectThreads, kSelectShared, stream},
                        &label_select, a);
}

}  // namespace effops::device
