// The tokens of the pages whose bounds are the largest: bounds of all pages into a workspace, a warp a page, then a
// block a list.
#include "primitives/element.h"
#include "primitives/reduce.h"
#include "selection/select_list.h"
#include "selection/selection.h"

namespace effops::device {
namespace {

constexpr int kScoreThreads = 128, kScorePages = 64;
static_assert(kBoundSums == kWarp);  // a lane has one of the sums

struct Params {
  PageSearchProblem p;
  int64_t tiles;
  float* scores;  // [batch, lists, pages]
};

template <class T>
__global__ void __launch_bounds__(kScoreThreads) page_scores(const __grid_constant__ Params a) {
  const PageSearchProblem& p = a.p;
  const int64_t tile = blockIdx.x % a.tiles, i = blockIdx.x / a.tiles, b = i / p.lists();
  const SelectionRange r = range_of(p, b);
  const int64_t first = r.first + tile * kScorePages, last = min_of(r.last, first + kScorePages);
  if (first >= last || !r.searches()) return;
  const int64_t head = p.first_head(i % p.lists()), g = head / p.group();
  const T* const q = reinterpret_cast<const T*>(p.q.data) + b * p.q.batch + head * p.q.head;
  const auto of = [&](const TensorView4& x, int64_t page) {
    return reinterpret_cast<const T*>(x.data) + b * x.batch + page * x.token + g * x.head;
  };
  for (int64_t j = first + warp_index(); j < last; j += kScoreThreads / kWarp) {
    const T *const low = of(p.low, j), *const high = of(p.high, j);
    float best = 0;
    for (int64_t row = 0; row < p.rows(); ++row) {
      float sum = 0;
      for (int64_t c = lane_index(); c < p.dim; c += kWarp) {
        const auto x = static_cast<float>(widen(q[row * p.q.head + c * p.q.dim]));
        const float least = __fmul_rn(x, static_cast<float>(widen(low[c * p.low.dim])));
        const float most = __fmul_rn(x, static_cast<float>(widen(high[c * p.high.dim])));
        sum = __fadd_rn(sum, max_of(least, most));
      }
      sum = reduce_lanes<kWarp>(sum, Sum());
      best = row == 0 ? sum : max_of(best, sum);
    }
    if (lane_index() == 0) a.scores[i * p.pages + j] = best;
  }
}

__global__ void __launch_bounds__(kSelectThreads) page_select(const __grid_constant__ Params a) {
  const PageSearchProblem& p = a.p;
  const int64_t i = blockIdx.x, b = i / p.lists(), length = p.length(b);
  int32_t* const to = p.indices + i * p.count * p.page;
  select_list(range_of(p, b), a.scores + i * p.pages, p.count, [&](int64_t n, int64_t page) {
    for (int64_t k = 0; k < p.page; ++k) {
      const int64_t token = page * p.page + k;
      to[n * p.page + k] = page >= 0 && token < length ? static_cast<int32_t>(token) : -1;
    }
  });
}

}  // namespace

int64_t page_search_workspace(const PageSearchProblem& p) {
  return p.batch * p.lists() * p.pages * static_cast<int64_t>(sizeof(float));
}

int page_search(const PageSearchProblem& p, void* workspace, void* stream) {
  const Params a{p, (p.pages + kScorePages - 1) / kScorePages, static_cast<float*>(workspace)};
  const int64_t lists = p.batch * p.lists();
  const int status = with_element(p.dtype, [&](auto element) {
    return launch<Params>({"page_topk: bounds", dim3(static_cast<unsigned>(a.tiles * lists)), kScoreThreads, 0, stream},
                          &page_scores<decltype(element)>, a);
  });
  if (status != 0) return status;
  return launch<Params>({"page_topk", dim3(static_cast<unsigned>(lists)), kSelectThreads, kSelectShared, stream},
                        &page_select, a);
}

}  // namespace effops::device
