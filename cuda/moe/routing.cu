// Top-k routing: a warp a token.
#include "moe/moe.h"
#include "moe/routing_token.h"

namespace effops::device {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int64_t kMostShared = 96 * 1024;  // of a block

template <class T>
__global__ void __launch_bounds__(kThreads, 8) topk_routing_rows(const __grid_constant__ RoutingParams a) {
  using C = Compute<T>;
  const int warps = blockDim.x / kWarp;
  C* const shared = reinterpret_cast<C*>(shared_memory()) + warp_index() * RoutingToken<T>::shared_items(a.p, a.kept);
  for (int64_t token = int64_t(blockIdx.x) * warps + warp_index(); token < a.p.tokens;
       token += int64_t(gridDim.x) * warps) {
    RoutingToken<T>(a, token, shared).run();
    __syncwarp();  // shared memory is the next token's
  }
}

template <class T>
int start(const RoutingProblem& p, void* stream) {
  RoutingParams a{p, FastDivide(static_cast<uint32_t>(p.experts / p.groups)), true};
  const auto bytes = [&] { return RoutingToken<T>::shared_items(p, a.kept) * int64_t(sizeof(Compute<T>)); };
  a.kept = bytes() <= kMostShared;
  if (bytes() > kMostShared) return kUnsupported;
  const int warps = static_cast<int>(clamp_to<int64_t>(kMostShared / bytes(), 1, kWarps));
  return launch<RoutingParams>(
      {"topk_routing", stride_grid((p.tokens + warps - 1) / warps), warps * kWarp, warps * bytes(), stream},
      &topk_routing_rows<T>, a);
}

}  // namespace

int topk_routing(const RoutingProblem& p, void* stream) {
  if (p.tokens == 0) return 0;
  return with_element(p.dtype, [&](auto element) { return start<decltype(element)>(p, stream); });
}

}  // namespace effops::device
