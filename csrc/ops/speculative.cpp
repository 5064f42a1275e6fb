// Token trees and their verification.
#include "common/tree.h"
#include "common/verify.h"
#include "ops/flaw_word.h"
#include "ops/sampling.h"

namespace effops::ops {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Accepted = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Strided<T> strided(const Arg& a) {
  Strided<T> s{reinterpret_cast<const T*>(a.data()), {}};
  std::copy(a.strides, a.strides + a.dim, s.stride);
  return s;
}

// int32 [B, T] rows that are trees.
void check_trees(const Arg& parents, const Readable<int32_t>& values) {
  for (int64_t b = 0; values && b < parents.size(0); ++b) {
    const int32_t* row = values.data() + b * values.stride(0);
    const TreeFault fault = tree_fault(row, values.stride(1), parents.size(1));
    EFFOPS_CHECK(fault.node < 0, parents.op, ": ", parents.name, ": expected ", fault.expected, ", got ",
                 row[fault.node * values.stride(1)], " at index [", b, ", ", fault.node, "]");
  }
}

std::tuple<Tensor, Tensor> pack_ancestors(Tensor parents) {
  const char* op = "pack_ancestors";
  const Backend backend(op, parents);
  const Arg a(op, "parents", parents);
  a.is(type_int32(), "int32").rank(2, "[B, T]");
  check_trees(a, Readable<int32_t>(a));
  const int64_t batch = a.size(0), tokens = a.size(1), words = ancestor_words(tokens);
  Tensor ancestors = empty({batch, tokens, words}, type_int64(), a), depths = empty({batch, tokens}, type_int32(), a);
  int64_t* to = reinterpret_cast<int64_t*>(Arg(a.op, "ancestors", ancestors).mutable_data());
  int32_t* depth = reinterpret_cast<int32_t*>(Arg(a.op, "depths", depths).mutable_data());
  if (backend.device()) {
    const TokenIndices all{reinterpret_cast<const int32_t*>(a.data()), a.stride(0), a.stride(1)};
    backend.launch(&DeviceLibrary::pack_ancestors, device::PackProblem{batch, tokens, all, to, depth});
    return {ancestors, depths};
  }
  for (int64_t b = 0; b < batch; ++b)
    effops::pack_ancestors(reinterpret_cast<const int32_t*>(a.data()) + b * a.stride(0), a.stride(1), tokens,
                           to + b * tokens * words, depth + b * tokens);
  return {ancestors, depths};
}

// The arguments that every verification has, checked, and its results.
struct VerifyCall {
  VerifyCall(const char* op_, const Tensor& parents_, const Tensor& draft_tokens)
      : op(op_), backend(op, parents_), parents(op, "parents", parents_), drafts(op, "draft_tokens", draft_tokens) {
    parents.is(type_int32(), "int32").rank(2, "[B or 1, T]");
    drafts.is(type_int64(), "int64").same_device(parents).rank(2, "[B, T]");
    p.op = op;
    p.batch = drafts.size(0);
    p.tokens = parents.size(1);
    check_shape(drafts, {{"B", -1}, {"T", p.tokens}});
    EFFOPS_CHECK(parents.size(0) == p.batch || parents.size(0) == 1, op, ": parents: expected shape [", p.batch,
                 " or 1, T], got ", parents.shape());
    tree = Readable<int32_t>(parents);
    check_trees(parents, tree);
    p.parents = {reinterpret_cast<const int32_t*>(parents.data()), parents.size(0) == 1 ? 0 : parents.stride(0),
                 parents.stride(1)};
    p.draft_tokens = strided<int64_t>(drafts);
    nodes = empty({p.batch, p.tokens}, type_int32(), parents);
    count = empty({p.batch}, type_int32(), parents);
    next_token = empty({p.batch}, type_int64(), parents);
    p.nodes = reinterpret_cast<int32_t*>(Arg(op, "nodes", nodes).mutable_data());
    p.count = reinterpret_cast<int32_t*>(Arg(op, "count", count).mutable_data());
    p.next_token = reinterpret_cast<int64_t*>(Arg(op, "next_token", next_token).mutable_data());
  }

  // float32 [B, T, V]; the target's come first and set V.
  Strided<float> laws(const char* name, const Tensor& t, int64_t vocab) const {
    const Arg a(op, name, t);
    a.is(type_float32(), "float32").same_device(parents);
    check_shape(a, {{"B", p.batch}, {"T", p.tokens}, {"V", vocab}});
    return strided<float>(a);
  }
  void take_target(const Tensor& t) {
    p.target_probs = laws("target_probs", t, -1);
    p.vocab = Arg(op, "target_probs", t).size(2);
    const Readable<int64_t> tokens(drafts);
    for (int64_t b = 0; tokens && b < p.batch; ++b)
      for (int64_t i = 1; i < p.tokens; ++i) {
        const int64_t v = tokens.at(b, i);
        EFFOPS_CHECK(tree.at(parents.size(0) == 1 ? 0 : b, i) < 0 || (v >= 0 && v < p.vocab), op,
                     ": draft_tokens: expected values in [0, ", p.vocab, ") (V), got ", v, " at index [", b, ", ", i,
                     "]");
      }
  }
  void take_uniforms(const Tensor& t, std::initializer_list<Extent> shape) {
    const Arg a(op, "uniforms", t);
    a.is(type_of(DType::f64), "float64").same_device(parents);
    check_shape(a, shape);
    p.uniforms = strided<double>(a);
    const Readable<double> values(a);
    for (int64_t b = 0; values && b < a.size(0); ++b)
      for (int64_t i = 0; i < (a.dim == 2 ? a.size(1) : 1); ++i) {
        const double u = values.at(b, i);
        EFFOPS_CHECK(u >= 0 && u < 1, op, ": uniforms: expected values in [0, 1), got ", u, " at index [", b,
                     a.dim == 2 ? ", " + std::to_string(i) : "", "]");
      }
  }
  // Of laws that a kernel found flawed, says how.
  template <class Launcher>
  void launch(Launcher launcher, const Tensor& target_probs, const OptionalTensor& draft_probs) {
    Tensor memory;
    void* workspace = backend.workspace(memory, parents, &DeviceLibrary::verify_workspace, p);
    const FlawWord word(backend, parents);
    backend.launch(launcher, p, workspace, word.data());
    const std::optional<int64_t> flaw = word.read();
    if (!flaw) return;
    const LawFlaw found = LawFlaw::of(*flaw);
    const Readable<float> rows(Arg(op, "", found.draft ? *draft_probs : target_probs));
    Strided<float>& to = found.draft ? p.draft_probs : p.target_probs;
    to = {rows.data(), {rows.stride(0), rows.stride(1), rows.stride(2)}};
    report(p, found);
  }
  Accepted results() const { return {nodes, count, next_token}; }

  const char* op;
  const Backend backend;
  Arg parents, drafts;
  Readable<int32_t> tree;
  VerifyProblem p;
  Tensor nodes, count, next_token;
};

Accepted verify_greedy(Tensor parents, Tensor draft_tokens, Tensor target_tokens) {
  VerifyCall call("verify_greedy", parents, draft_tokens);
  const Arg given(call.op, "target_tokens", target_tokens);
  if (given.dim == 3 && given.type != type_int64()) {
    given.same_device(call.parents);
    check_shape(given, {{"B", call.p.batch}, {"T", call.p.tokens}, {"V", -1}});
    target_tokens = greedy_tokens(call.backend, call.op, given.name, target_tokens);
  }
  const Arg target(call.op, "target_tokens", target_tokens);
  target.is(type_int64(), "int64").same_device(call.parents);
  check_shape(target, {{"B", call.p.batch}, {"T", call.p.tokens}});
  call.p.target_tokens = strided<int64_t>(target);
  call.backend.device() ? call.backend.launch(&DeviceLibrary::verify_greedy, call.p) : effops::verify_greedy(call.p);
  return call.results();
}

Accepted verify_rejection(Tensor parents, Tensor draft_tokens, OptionalTensor draft_probs, Tensor target_probs,
                          Tensor uniforms, std::string siblings) {
  const char* op = "verify_rejection";
  VerifyCall call(op, parents, draft_tokens);
  if (siblings == "iid") {
    call.p.siblings = Siblings::iid;
  } else if (siblings == "without_replacement") {
    call.p.siblings = Siblings::without_replacement;
  } else {
    EFFOPS_CHECK(siblings == "deterministic", op,
                 ": siblings: expected iid, without_replacement or deterministic, got ", siblings);
  }
  const bool drawn = call.p.siblings != Siblings::deterministic;
  EFFOPS_CHECK(drawn == draft_probs.has_value(), op, ": draft_probs: expected ", drawn ? "a tensor" : "none",
               " for siblings = ", siblings, ", got ", drawn ? "none" : "a tensor");
  call.take_target(target_probs);
  if (drawn) call.p.draft_probs = call.laws("draft_probs", *draft_probs, call.p.vocab);
  call.take_uniforms(uniforms, {{"B", call.p.batch}, {"T + 1", call.p.tokens + 1}});
  if (call.backend.device()) {
    call.launch(&DeviceLibrary::verify_rejection, target_probs, draft_probs);
  } else {
    effops::verify_rejection(call.p, torch_threads());
  }
  return call.results();
}

Accepted verify_typical(Tensor parents, Tensor draft_tokens, Tensor target_probs, double epsilon, double delta,
                        OptionalTensor uniforms) {
  const char* op = "verify_typical";
  VerifyCall call(op, parents, draft_tokens);
  EFFOPS_CHECK(epsilon >= 0 && epsilon <= 1, op, ": epsilon: expected a number in [0, 1], got ", epsilon);
  EFFOPS_CHECK(delta >= 0 && delta <= 1, op, ": delta: expected a number in [0, 1], got ", delta);
  call.p.epsilon = epsilon;
  call.p.delta = delta;
  call.take_target(target_probs);
  if (uniforms) call.take_uniforms(*uniforms, {{"B", call.p.batch}});
  if (call.backend.device()) {
    call.launch(&DeviceLibrary::verify_typical, target_probs, std::nullopt);
  } else {
    effops::verify_typical(call.p, torch_threads());
  }
  return call.results();
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("pack_ancestors", TORCH_BOX(&pack_ancestors));
  m.impl("verify_greedy", TORCH_BOX(&verify_greedy));
  m.impl("verify_rejection", TORCH_BOX(&verify_rejection));
  m.impl("verify_typical", TORCH_BOX(&verify_typical));
}

}  // namespace effops::ops
