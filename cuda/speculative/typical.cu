// The longest path of which every node is typical for its parent's law; of equals the likeliest, then the first. A
// block a sequence.
#include "speculative/law.h"
#include "speculative/speculative.h"
#include "speculative/walk.h"

namespace effops::device {
namespace {

struct Node {
  int64_t length = 0;  // of the accepted path that ends here
  double score = 0;    // sum of log p along it
  double total = 0, threshold = 0;
};

// The first of the largest weights.
__device__ int64_t likeliest(const VerifyParams& a, const Law& law) {
  double top = -1;
  int64_t first = a.p.vocab;
  for (int64_t v = threadIdx.x; v < a.p.vocab; v += blockDim.x)
    if (law.weight(v) > top) {
      top = law.weight(v);
      first = v;
    }
  const double most = reduce_block(top, Max(), -1.0, law_scratch());
  if (top != most) first = a.p.vocab;
  first = -reduce_block(-first, Max(), -a.p.vocab, reinterpret_cast<int64_t*>(law_scratch()));
  return first < a.p.vocab ? first : 0;
}

__global__ void __launch_bounds__(kMostLawThreads) walk_typical(VerifyParams a) {
  const VerifyProblem& p = a.p;
  const bool writes = threadIdx.x == 0;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    Walk walk(p, b);
    if (walk.absent()) {
      walk.finish(-1, threadIdx.x, blockDim.x);
      continue;
    }
    Node* const nodes = reinterpret_cast<Node*>(a.workspace) + b * p.tokens;
    for (int64_t i = threadIdx.x; i < p.tokens; i += blockDim.x) nodes[i] = Node{i == 0};
    __syncthreads();
    int64_t best = 0, best_length = 1;
    double best_score = 0;
    for (int64_t i = 1; i < p.tokens; ++i) {
      const int64_t parent = walk.parent(i), token = walk.token(i);
      if (parent < 0 || parent >= i || token < 0 || token >= p.vocab) continue;
      Node from = nodes[parent];
      if (from.length == 0) continue;
      if (from.total == 0) {
        const Law law = load_law(a, false, b, parent);
        const double minus_entropy =
            block_sum(p.vocab, [&](int64_t v) { return law.of(v) * log_of(law.of(v) + 1e-5); });
        from.total = law.total;
        from.threshold = min_of(p.epsilon, p.delta * exp_of(minus_entropy));
        if (writes) nodes[parent] = from;
      }
      const double chance = static_cast<double>(p.target_probs.at(b, parent, token)) / from.total;
      if (chance > from.threshold) {
        const int64_t length = from.length + 1;
        const double score = from.score + log_of(chance);
        if (writes) nodes[i] = {length, score, 0, 0};
        if (length > best_length || (length == best_length && score > best_score)) {
          best = i;
          best_length = length;
          best_score = score;
        }
      }
      __syncthreads();
    }
    int64_t i = best;
    for (int64_t place = best_length; writes && place-- > 0; i = walk.parent(i))
      walk.nodes[place] = static_cast<int32_t>(i);
    walk.count = static_cast<int32_t>(best_length);
    const Law law = load_law(a, false, b, best);
    walk.finish(p.uniforms.data ? draw(a, law, p.uniforms.at(b)) : likeliest(a, law), threadIdx.x, blockDim.x);
  }
}

}  // namespace

int64_t verify_workspace(const VerifyProblem& p) {
  const int64_t laws = 2 * p.vocab * sizeof(double), nodes = p.tokens * sizeof(Node);
  return p.batch * (p.draft_probs.data ? laws : nodes);
}

int verify_typical(const VerifyProblem& p, void* workspace, int64_t* flaw, void* stream) {
  const VerifyParams a{p, static_cast<char*>(workspace), flaw};
  const Launch l{"verify_typical", stride_grid(p.batch), law_threads(p), kLawSharedBytes, stream};
  return launch<VerifyParams>(l, &walk_typical, a);
}

}  // namespace effops::device
