// Nodes that are what the target would have said: a warp a sequence.
#include "speculative/speculative.h"
#include "speculative/walk.h"

namespace effops::device {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

__global__ void walk_greedy(VerifyProblem p) {
  for (int64_t b = int64_t(blockIdx.x) * kWarps + warp_index(); b < p.batch; b += int64_t(gridDim.x) * kWarps) {
    Walk walk(p, b);
    int64_t next_token = -1;
    if (!walk.absent()) {
      int64_t i = 0;
      do {
        walk.accept(i, lane_index() == 0);
        next_token = p.target_tokens.at(b, i);
        i = walk.next_child(i + 1, [&](int64_t n) { return walk.token(n) >= 0 && walk.token(n) == next_token; });
      } while (i < p.tokens);
    }
    walk.finish(next_token, lane_index(), kWarp);
  }
}

}  // namespace

int verify_greedy(const VerifyProblem& p, void* stream) {
  const Launch l{"verify_greedy", stride_grid((p.batch + kWarps - 1) / kWarps), kThreads, 0, stream};
  return launch<VerifyProblem>(l, &walk_greedy, p);
}

}  // namespace effops::device
