// Trees and their verification on hand-made cases, every argument in guarded memory.
#include "check.h"
#include "common/tree.h"
#include "common/verify.h"
#include "tensor.h"
#include "threads.h"

namespace effops::test {
namespace {

template <class T>
std::string text(const T* from, int64_t count) {
  std::string s;
  for (int64_t i = 0; i < count; ++i) s += std::to_string(from[i]) + " ";
  return s;
}

TEST(tree_faults) {
  const auto fault = [](std::vector<int32_t> parents) {
    const List<int32_t> given(parents);
    return tree_fault(given.get(), 1, static_cast<int64_t>(parents.size())).node;
  };
  CHECK(fault({}) == -1 && fault({-1}) == -1 && fault({-1, 0, -2, 1}) == -1 && fault({-2, -2}) == -1, "good trees");
  CHECK(fault({0}) == 0 && fault({-3}) == 0, "the root");
  CHECK(fault({-1, 1}) == 1 && fault({-1, -1}) == 1 && fault({-1, 0, -3}) == 2,
        "a parent that is not before its child");
  CHECK(fault({-1, -2, 1}) == 2 && fault({-2, 0}) == 1, "a child of padding");
}

TEST(pack_ancestors) {
  constexpr int64_t kNodes = 130;
  std::vector<int32_t> parents(2 * kNodes);  // with stride 2
  Random random(5);
  for (int64_t i = 0; i < kNodes; ++i) {
    const bool padding = i > 0 && i % 7 == 3;
    int64_t parent = random.between(std::max<int64_t>(0, i - 3), std::max<int64_t>(0, i - 1));
    while (i > 0 && parents[2 * parent] == kTreePadding) --parent;
    parents[2 * i] = static_cast<int32_t>(i == 0 ? kTreeRoot : padding ? kTreePadding : parent);
  }
  const List<int32_t> given(parents);
  CHECK(tree_fault(given.get(), 2, kNodes).node < 0, "not a tree");
  const int64_t width = ancestor_words(kNodes);
  CHECK(width == 3, width);
  Guarded words(kNodes * width * 8, 8), depths(kNodes * 4, 4);
  const int64_t* word = reinterpret_cast<const int64_t*>(words.data());
  const int32_t* depth = reinterpret_cast<const int32_t*>(depths.data());
  pack_ancestors(given.get(), 2, kNodes, reinterpret_cast<int64_t*>(words.data()),
                 reinterpret_cast<int32_t*>(depths.data()));
  for (int64_t i = 0; i < kNodes; ++i) {
    std::vector<bool> sees(width * 64);
    int32_t ancestors = -1;
    for (int64_t j = i; j >= 0; j = parents[2 * j]) {
      sees[j] = true;
      ++ancestors;
    }
    CHECK(depth[i] == ancestors, "depth of ", i, ": ", depth[i]);
    for (int64_t j = 0; j < width * 64; ++j)
      CHECK(((word[i * width + j / 64] >> (j % 64)) & 1) == sees[j], "node ", i, " and ", j);
  }
}

// One tree for two sequences of six nodes and four tokens.
struct Case {
  static constexpr int64_t kBatch = 2, kNodes = 6, kVocab = 4;

  List<int32_t> parents = std::vector<int32_t>{-1, 0, 0, 1, 1, -2};
  List<int64_t> tokens = std::vector<int64_t>{9, 2, 1, 0, 3, 3, 9, 1, 1, 3, 0, 0};
  Tensor target{DType::f32, {kBatch, kNodes, kVocab, 1}, Layout::strided};
  Tensor draft{DType::f32, {kBatch, kNodes, kVocab, 1}, Layout::gapped};
  Guarded nodes{kBatch * kNodes * 4, 4}, count{kBatch * 4, 4}, next{kBatch * 8, 8};

  VerifyProblem problem() {
    VerifyProblem p;
    p.op = "verify";
    p.batch = kBatch;
    p.tokens = kNodes;
    p.vocab = kVocab;
    p.parents = {parents.get(), 0, 1};
    p.draft_tokens = {tokens.get(), {kNodes, 1}};
    p.target_probs = rows(target);
    p.draft_probs = rows(draft);
    p.nodes = reinterpret_cast<int32_t*>(nodes.data());
    p.count = reinterpret_cast<int32_t*>(count.data());
    p.next_token = reinterpret_cast<int64_t*>(next.data());
    return p;
  }
  // Rows of the same law after every node.
  static void fill(Tensor& t, const std::vector<double>& law) {
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t i = 0; i < kNodes; ++i)
        for (int64_t v = 0; v < kVocab; ++v) t.set(b, i, v, 0, law[v]);
  }
  static Strided<float> rows(const Tensor& t) {
    return {reinterpret_cast<const float*>(t.data()), {t.stride(0), t.stride(1), t.stride(2)}};
  }
  std::string result() const {
    return text(reinterpret_cast<const int32_t*>(nodes.data()), kBatch * kNodes) + "| " +
           text(reinterpret_cast<const int32_t*>(count.data()), kBatch) + "| " +
           text(reinterpret_cast<const int64_t*>(next.data()), kBatch);
  }
};

TEST(verify_greedy) {
  Case c;
  VerifyProblem p = c.problem();
  const List<int64_t> target(std::vector<int64_t>{2, 3, 0, 0, 2, 3, 1, 2, 3, 0, 0, 0});
  p.target_tokens = {target.get(), {Case::kNodes, 1}};
  verify_greedy(p);
  CHECK(c.result() == "0 1 4 -1 -1 -1 0 1 -1 -1 -1 -1 | 3 2 | 2 2 ", c.result());
}

TEST(verify_rejection_deterministic) {
  Case c;
  Case::fill(c.target, {1, 1, 1, 1});
  VerifyProblem p = c.problem();
  const List<double> u(std::vector<double>{0.5, 0.75, 0, 0, 0.25, 0, 0, 0.25, 0.5, 0, 0, 0, 0, 0});
  p.uniforms = {u.get(), {Case::kNodes + 1, 1}};
  verify_rejection(p, {});
  CHECK(c.result() == "0 1 4 -1 -1 -1 0 1 -1 -1 -1 -1 | 3 2 | 1 2 ", c.result());
}

// p = (0, 1, 1, 2) / 4, q = (1, 1, 2, 0) / 4. Sequence 0: node 1 (token 2) has p / q = 1/2; what its rejection leaves
// is token 3 alone. Sequence 1: node 1 (token 1) has p / q = 1; token 3 below cannot have been drawn, token 0 cannot
// be accepted, and with replacement the final draw is from what token 0 left, token 3.
TEST(verify_rejection_drawn) {
  Case c;
  Case::fill(c.target, {0, 2, 2, 4});
  Case::fill(c.draft, {0.25, 0.25, 0.5, 0});
  VerifyProblem p = c.problem();
  const List<double> u(std::vector<double>{0, 0.5, 0, 0, 0, 0, 0, 0, 0.99, 0, 0, 0, 0, 0});
  p.uniforms = {u.get(), {Case::kNodes + 1, 1}};
  for (Siblings siblings : {Siblings::iid, Siblings::without_replacement}) {
    p.siblings = siblings;
    verify_rejection(p, {});
    CHECK(c.result() == "0 -1 -1 -1 -1 -1 0 1 -1 -1 -1 -1 | 1 2 | 3 3 ", c.result());
  }
}

TEST(verify_typical) {
  Case c;
  Case::fill(c.target, {1, 1, 1, 5});
  VerifyProblem p = c.problem();
  p.epsilon = 1;
  verify_typical(p, {});  // delta 0: the longest, through the likelier token 3
  CHECK(c.result() == "0 1 4 -1 -1 -1 0 1 3 -1 -1 -1 | 3 3 | 3 3 ", c.result());
  p.epsilon = 0.125;
  p.delta = 1;
  verify_typical(p, {});  // token 3 alone is typical, and no child of the root carries it
  CHECK(c.result() == "0 -1 -1 -1 -1 -1 0 -1 -1 -1 -1 -1 | 1 1 | 3 3 ", c.result());
}

TEST(verify_names_a_row_that_is_no_law) {
  Case c;
  const List<double> u(std::vector<double>(14, 0.5));
  for (double bad : {0.0, -1.0, double(NAN), double(INFINITY)}) {
    Case::fill(c.target, {0, bad, 0, 0});
    VerifyProblem p = c.problem();
    p.uniforms = {u.get(), {Case::kNodes + 1, 1}};
    std::string said;
    try {
      verify_rejection(p, {});
    } catch (const std::runtime_error& e) {
      said = e.what();
    }
    const std::string expected =
        bad == 0 || bad > 0 ? "a row with a positive, finite sum" : "probabilities of 0 or more";
    CHECK(said.rfind("verify: target_probs: expected " + expected, 0) == 0, said);
  }
}

// Enough work for threads: sequence b draws token b after its root, and after the child that carries it.
TEST(verify_on_threads) {
  constexpr int64_t kBatch = 64, kNodes = 2, kVocab = 500;
  std::vector<int64_t> tokens;
  std::vector<double> uniforms;
  for (int64_t b = 0; b < kBatch; ++b) {
    tokens.insert(tokens.end(), {0, b});
    uniforms.insert(uniforms.end(), 3, (b + 0.5) / kVocab);
  }
  const List<int32_t> parents(std::vector<int32_t>{-1, 0});
  const List<int64_t> drafts(tokens);
  const List<double> u(uniforms);
  const List<float> law(std::vector<float>(kVocab, 2.0f));
  std::vector<int32_t> nodes(kBatch * kNodes), count(kBatch);
  std::vector<int64_t> next(kBatch);
  VerifyProblem p;
  p.batch = kBatch;
  p.tokens = kNodes;
  p.vocab = kVocab;
  p.parents = {parents.get(), 0, 1};
  p.draft_tokens = {drafts.get(), {kNodes, 1}};
  p.target_probs = p.draft_probs = {law.get(), {0, 0, 1}};
  p.uniforms = {u.get(), {3, 1}};
  p.nodes = nodes.data();
  p.count = count.data();
  p.next_token = next.data();
  for (Siblings siblings : {Siblings::deterministic, Siblings::iid, Siblings::without_replacement}) {
    p.siblings = siblings;
    verify_rejection(p, std_threads(4));
    for (int64_t b = 0; b < kBatch; ++b)
      CHECK(nodes[2 * b] == 0 && nodes[2 * b + 1] == 1 && count[b] == 2 && next[b] == b, "sequence ", b);
  }
}

TEST(verify_nothing) {
  VerifyProblem p;
  verify_greedy(p);
  verify_rejection(p, {});
  verify_typical(p, {});
}

}  // namespace
}  // namespace effops::test
