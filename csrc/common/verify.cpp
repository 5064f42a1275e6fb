#include "common/verify.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "common/scratch.h"
#include "common/tree.h"

namespace effops {
namespace {

constexpr int64_t kSerialEntries = 1 << 14;  // entries of the laws of a node that one thread does alone

// One sequence: its tree and where its result goes.
struct Sequence {
  Sequence(const VerifyProblem& p_, int64_t b_) : p(p_), b(b_), nodes(p.nodes + b * p.tokens) {
    std::fill(nodes, nodes + p.tokens, -1);
    p.count[b] = 0;
    p.next_token[b] = -1;
    if (!absent()) accept(0);
  }

  bool absent() const { return p.tokens == 0 || parent(0) == kTreePadding; }
  int64_t parent(int64_t i) const { return p.parents.of(b, i); }
  int64_t token(int64_t i) const { return p.draft_tokens.at(b, i); }
  void accept(int64_t i) { nodes[p.count[b]++] = static_cast<int32_t>(i); }

  const VerifyProblem& p;
  int64_t b;
  int32_t* nodes;
};

// f(0) + ... + f(count - 1), in eight sums that do not wait for each other.
template <class F>
double sum(int64_t count, F&& f) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += f(i + j);
  for (; i < count; ++i) part[i & 7] += f(i);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// A law over the vocabulary: weights and what they sum to.
struct Law {
  double* weight = nullptr;
  double total = 0;

  double of(int64_t token) const { return weight[token] / total; }
};

[[noreturn]] void no_law(const VerifyProblem& p, const char* name, const Strided<float>& rows, int64_t b, int64_t i,
                         double total) {
  std::ostringstream message;
  message << p.op << ": " << name << ": expected ";
  for (int64_t v = 0; v < p.vocab; ++v)
    if (!(rows.at(b, i, v) >= 0)) {
      message << "probabilities of 0 or more, got " << rows.at(b, i, v) << " at index [" << b << ", " << i << ", " << v;
      throw std::runtime_error(message.str() + "]");
    }
  message << "a row with a positive, finite sum, got " << total << " at index [" << b << ", " << i << "]";
  throw std::runtime_error(message.str());
}

Law load(const VerifyProblem& p, const char* name, const Strided<float>& rows, int64_t b, int64_t i, double* to) {
  const float* row = rows.data + b * rows.stride[0] + i * rows.stride[1];
  const int64_t stride = rows.stride[2];
  double least = 0;
  bool numbers = true;
  const auto take = [&](int64_t v, double x) {
    numbers = numbers && x == x;
    least = std::min(least, x);
    return to[v] = x;
  };
  const double total = stride == 1 ? sum(p.vocab, [&](int64_t v) { return take(v, row[v]); })
                                   : sum(p.vocab, [&](int64_t v) { return take(v, row[v * stride]); });
  if (!numbers || least < 0 || !(total > 0 && std::isfinite(total))) no_law(p, name, rows, b, i, total);
  return {to, total};
}

double sum_of(const VerifyProblem& p, const Strided<float>& rows, int64_t b, int64_t i) {
  return sum(p.vocab, [&](int64_t v) { return static_cast<double>(rows.at(b, i, v)); });
}

Law target_law(const Sequence& s, int64_t i, double* to) {
  return load(s.p, "target_probs", s.p.target_probs, s.b, i, to);
}

// Inverse CDF in id order. Rounding must not lead past the last possible token.
int64_t draw(const Law& law, int64_t vocab, double uniform) {
  const double goal = uniform * law.total;
  double reached = 0;
  int64_t last = 0;
  for (int64_t v = 0; v < vocab; ++v) {
    if (law.weight[v] == 0) continue;
    reached += law.weight[v];
    last = v;
    if (reached > goal) break;
  }
  return last;
}

// One draw from the target decides: a child that carries the token is accepted, else the token is the next.
void walk_deterministic(Sequence& s, double* scratch) {
  const VerifyProblem& p = s.p;
  int64_t at = 0;
  const auto stand = [&] { return draw(target_law(s, at, scratch), p.vocab, p.uniforms.at(s.b, at)); };
  int64_t drawn = stand();
  for (int64_t i = 1; i < p.tokens; ++i) {
    if (s.parent(i) != at || s.token(i) != drawn) continue;
    s.accept(at = i);
    drawn = stand();
  }
  p.next_token[s.b] = drawn;
}

// Multi-round rejection: a sibling's turn comes with what the target has left after those before it. Children come
// after their parents, so one pass over the nodes is the whole walk.
void walk_drawn(Sequence& s, double* scratch) {
  const VerifyProblem& p = s.p;
  double *drafted = scratch, *spare = scratch + 2 * p.vocab;
  int64_t at = 0;
  bool first = true;  // of the children of `at`
  Law left = target_law(s, at, scratch + p.vocab), draft;
  for (int64_t i = 1; i < p.tokens; ++i) {
    if (s.parent(i) != at) continue;
    if (first || p.siblings == Siblings::iid) draft = load(p, "draft_probs", p.draft_probs, s.b, i, drafted);
    first = false;
    const int64_t token = s.token(i);
    if (draft.weight[token] == 0) continue;  // cannot have been drawn: nothing follows from it
    if (p.uniforms.at(s.b, i) * draft.of(token) < left.of(token)) {
      s.accept(at = i);
      left = target_law(s, at, left.weight);
      first = true;
      continue;
    }
    const double a = 1 / left.total, d = 1 / draft.total;
    const double rest =
        sum(p.vocab, [&](int64_t v) { return spare[v] = std::max(left.weight[v] * a - draft.weight[v] * d, 0.0); });
    if (rest > 0) {  // 0: by rounding alone
      std::swap(left.weight, spare);
      left.total = rest;
    }
    if (p.siblings == Siblings::without_replacement) {
      draft.weight[token] = 0;
      draft.total = sum(p.vocab, [&](int64_t v) { return draft.weight[v]; });  // a difference would cancel
    }
  }
  p.next_token[s.b] = draw(left, p.vocab, p.uniforms.at(s.b, p.tokens));
}

// The longest path of which every node is typical for its parent's law; of equals the likeliest, then the first.
void walk_typical(Sequence& s, double* scratch) {
  struct Node {
    int64_t length = 0;  // of the accepted path that ends here
    double score = 0;    // sum of log p along it
    double total = 0, threshold = 0;
  };
  const VerifyProblem& p = s.p;
  std::vector<Node> nodes(p.tokens);
  nodes[0].length = 1;
  int64_t best = 0;
  for (int64_t i = 1; i < p.tokens; ++i) {
    if (s.parent(i) < 0 || nodes[s.parent(i)].length == 0) continue;
    Node& from = nodes[s.parent(i)];
    if (from.total == 0) {
      const Law law = target_law(s, s.parent(i), scratch);
      const double minus_entropy = sum(p.vocab, [&](int64_t v) { return law.of(v) * std::log(law.of(v) + 1e-5); });
      from.total = law.total;
      from.threshold = std::min(p.epsilon, p.delta * std::exp(minus_entropy));
    }
    const double chance = p.target_probs.at(s.b, s.parent(i), s.token(i)) / from.total;
    if (!(chance > from.threshold)) continue;
    nodes[i].length = from.length + 1;
    nodes[i].score = from.score + std::log(chance);
    if (nodes[i].length > nodes[best].length ||
        (nodes[i].length == nodes[best].length && nodes[i].score > nodes[best].score))
      best = i;
  }
  p.count[s.b] = static_cast<int32_t>(nodes[best].length);
  for (int64_t i = best, place = nodes[best].length; place-- > 0; i = s.parent(i))
    s.nodes[place] = static_cast<int32_t>(i);
  const Law law = target_law(s, best, scratch);
  p.next_token[s.b] = p.uniforms.data ? draw(law, p.vocab, p.uniforms.at(s.b))
                                      : std::max_element(law.weight, law.weight + p.vocab) - law.weight;
}

// walk(sequence, scratch of `laws` laws) for every sequence that is there.
template <class F>
void for_each_sequence(const VerifyProblem& p, int64_t laws, const Parallel& parallel, F&& walk) {
  parallel.for_each(p.batch, p.batch * p.vocab > kSerialEntries, [&](int64_t b) {
    Sequence s(p, b);
    if (s.absent()) return;
    walk(s, static_cast<double*>(thread_scratch(Scratch::task, laws * p.vocab * sizeof(double))));
  });
}

}  // namespace

void report(const VerifyProblem& p, LawFlaw flaw) {
  const Strided<float>& rows = flaw.draft ? p.draft_probs : p.target_probs;
  const int64_t b = flaw.row / p.tokens, i = flaw.row % p.tokens;
  no_law(p, flaw.draft ? "draft_probs" : "target_probs", rows, b, i, sum_of(p, rows, b, i));
}

void verify_greedy(const VerifyProblem& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    Sequence s(p, b);
    if (s.absent()) continue;
    int64_t at = 0;
    for (int64_t i = 1; i < p.tokens; ++i)
      if (s.parent(i) == at && s.token(i) >= 0 && s.token(i) == p.target_tokens.at(b, at)) s.accept(at = i);
    p.next_token[b] = p.target_tokens.at(b, at);
  }
}

void verify_rejection(const VerifyProblem& p, const Parallel& parallel) {
  if (p.siblings == Siblings::deterministic) for_each_sequence(p, 1, parallel, &walk_deterministic);
  else for_each_sequence(p, 3, parallel, &walk_drawn);
}

void verify_typical(const VerifyProblem& p, const Parallel& parallel) {
  for_each_sequence(p, 1, parallel, &walk_typical);
}

}  // namespace effops
