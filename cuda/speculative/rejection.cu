// Verification by draws: a block a sequence. The rules are those of csrc/common/verify.cpp.
#include "speculative/law.h"
#include "speculative/speculative.h"
#include "speculative/walk.h"

namespace effops::device {
namespace {

// One draw from the target decides: a child that carries the token is accepted, else the token is the next.
__global__ void __launch_bounds__(kMostLawThreads) walk_deterministic(VerifyParams a) {
  for (int64_t b = blockIdx.x; b < a.p.batch; b += gridDim.x) {
    Walk walk(a.p, b);
    int64_t drawn = -1;
    if (!walk.absent()) {
      int64_t i = 0;
      do {
        walk.accept(i, threadIdx.x == 0);
        drawn = draw(a, load_law(a, false, b, i), a.p.uniforms.at(b, i));
        i = walk.next_child(i + 1, [&](int64_t n) { return walk.token(n) == drawn; });
      } while (i < a.p.tokens);
    }
    walk.finish(drawn, threadIdx.x, blockDim.x);
  }
}

// What the target has left, and a draft without the tokens that have been tried, once they differ from rows of the
// call.
struct Drawn {
  const VerifyParams& a;
  double *left_memory, *draft_memory;
  Law left, draft;

  // left becomes the positive part of left - draft, both normalised; by rounding alone there may be none.
  __device__ void take_draft() {
    const double l = 1 / left.total, d = 1 / draft.total;
    auto rest = [&](int64_t v) {
      const double w = left.weight(v) * l - draft.weight(v) * d;
      return w > 0 ? w : 0.0;
    };
    const double total = block_sum(a.p.vocab, rest);
    if (!(total > 0)) return;
    for (int64_t v = threadIdx.x; v < a.p.vocab; v += blockDim.x) left_memory[v] = rest(v);
    __syncthreads();
    left.own = left_memory;
    left.total = total;
  }

  __device__ void drop(int64_t token) {
    for (int64_t v = threadIdx.x; v < a.p.vocab; v += blockDim.x) draft_memory[v] = v == token ? 0 : draft.weight(v);
    __syncthreads();
    draft.own = draft_memory;
    draft.total = block_sum(a.p.vocab, [&](int64_t v) { return draft.weight(v); });  // a difference would cancel
  }
};

// Multi-round rejection: a sibling's turn comes with what the target has left after those before it.
__global__ void __launch_bounds__(kMostLawThreads) walk_drawn(VerifyParams a) {
  const VerifyProblem& p = a.p;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    Walk walk(p, b);
    int64_t next_token = -1;
    if (!walk.absent()) {
      double* const memory = reinterpret_cast<double*>(a.workspace) + b * 2 * p.vocab;
      Drawn d{a, memory, memory + p.vocab, load_law(a, false, b, 0), {}};
      walk.accept(0, threadIdx.x == 0);
      bool first = true;  // of the children of walk.at
      auto any = [](int64_t) { return true; };
      for (int64_t i = walk.next_child(1, any); i < p.tokens; i = walk.next_child(i + 1, any)) {
        if (first || p.siblings == Siblings::iid) d.draft = load_law(a, true, b, i);
        first = false;
        const int64_t token = walk.token(i);
        // One that cannot have been drawn: nothing follows from it.
        if (token < 0 || token >= p.vocab || d.draft.weight(token) == 0) continue;
        if (p.uniforms.at(b, i) * d.draft.of(token) < d.left.of(token)) {
          walk.accept(i, threadIdx.x == 0);
          d.left = load_law(a, false, b, i);
          first = true;
          continue;
        }
        d.take_draft();
        if (p.siblings == Siblings::without_replacement) d.drop(token);
      }
      next_token = draw(a, d.left, p.uniforms.at(b, p.tokens));
    }
    walk.finish(next_token, threadIdx.x, blockDim.x);
  }
}

}  // namespace

int verify_rejection(const VerifyProblem& p, void* workspace, int64_t* flaw, void* stream) {
  const VerifyParams a{p, static_cast<char*>(workspace), flaw};
  const Launch l{"verify_rejection", stride_grid(p.batch), law_threads(p), kLawSharedBytes, stream};
  return launch<VerifyParams>(l, p.siblings == Siblings::deterministic ? &walk_deterministic : &walk_drawn, a);
}

}  // namespace effops::device
