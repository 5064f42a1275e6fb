// The bounds of pages, widened by new keys: a block has some of the pages of one sequence and head and walks through
// all tokens, a thread has channels, so that a page's tokens come in order and no two threads meet.
#include "primitives/element.h"
#include "selection/selection.h"

namespace effops::device {
namespace {

constexpr int kMostThreads = 128;
constexpr int64_t kMostShares = 64;

struct Params {
  PageAppendProblem p;
  int64_t shares;  // of a sequence's pages: every so many-th page is in one
};

template <class T>
__global__ void append_page_bounds_of(const __grid_constant__ Params a) {
  const PageAppendProblem& p = a.p;
  const int64_t share = blockIdx.x % a.shares, bg = blockIdx.x / a.shares, g = bg % p.heads, b = bg / p.heads;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t slot = p.slots.of(b, t), page = slot / p.page;
    if (slot < 0 || page >= p.pages || page % a.shares != share) continue;
    const auto of = [&](const TensorView4& x, int64_t token) {
      return reinterpret_cast<T*>(x.data) + b * x.batch + token * x.token + g * x.head;
    };
    const T* const key = of(p.keys, t);
    T *const low = of(p.low, page), *const high = of(p.high, page);
    const bool anew = slot % p.page == 0;
    for (int64_t c = threadIdx.x; c < p.dim; c += blockDim.x) {
      const T x = key[c * p.keys.dim];
      if (anew || widen(x) < widen(low[c * p.low.dim])) low[c * p.low.dim] = x;
      if (anew || widen(x) > widen(high[c * p.high.dim])) high[c * p.high.dim] = x;
    }
  }
}

}  // namespace

int page_append(const PageAppendProblem& p, void* stream) {
  const Params a{p, min_of(kMostShares, (p.tokens + p.page - 1) / p.page)};
  const int threads = static_cast<int>(min_of<int64_t>(kMostThreads, (p.dim + kWarp - 1) / kWarp * kWarp));
  const dim3 grid(static_cast<unsigned>(a.shares * p.heads * p.batch));
  return with_element(p.dtype, [&](auto element) {
    return launch<Params>({"append_page_bounds", grid, threads, 0, stream}, &append_page_bounds_of<decltype(element)>,
                          a);
  });
}

}  // namespace effops::device
