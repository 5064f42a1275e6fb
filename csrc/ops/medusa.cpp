// medusa_draft on the CPU: the tokens of a tree from one hidden state a sequence, in one call.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "common/sampling_problem.h"
#include "common/team.h"
#include "ops/backend.h"
#include "ops/layer.h"

namespace effops::ops {
namespace {

const char* const op = "medusa_draft";

char* data_of(const Tensor& t) { return Arg(op, "result", t).mutable_data(); }

// The weights of heads as plain memory; null where there are none.
struct Heads {
  DType dtype;
  int64_t heads, layers, stored, d;  // the first `heads` of those stored run
  const char *weight, *bias, *projections, *roots;
};

// What the LM heads read, [K, B, d], of hidden states and embeddings of the root, [B, d] both.
Tensor states(const Heads& m, const Arg& like, const char* hidden, const char* embedded, int64_t batch,
              const Parallel& parallel) {
  const int64_t matrix = m.d * m.d, item = size_of(m.dtype);
  LinearProblem p;
  p.dtype = m.dtype;
  p.rows = batch;
  p.in = p.out = p.x_row = p.weight_row = p.residual_row = p.y_row = m.d;
  p.groups = m.heads;
  p.weight_group = matrix;
  p.bias_group = m.d;
  p.y_group = batch * m.d;
  std::optional<Tensor> z;  // of the step before
  auto run = [&](const char* x, int64_t x_group, const char* weight) {
    Tensor y = empty({m.heads, batch, m.d}, like.type, like);
    p.x = x;
    p.x_group = x_group;
    p.weight = weight;
    p.y = data_of(y);
    cpu::kernels().linear(p, parallel);
    z = y;
  };
  p.silu = true;
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const char* x = layer == 0 ? hidden : data_of(*z);
    p.residual_group = layer == 0 ? 0 : p.y_group;
    p.residual = x;
    p.bias = m.bias + layer * m.stored * m.d * item;
    run(x, p.residual_group, m.weight + layer * m.stored * matrix * item);
  }
  p.silu = false;
  p.bias = p.residual = nullptr;
  if (m.projections != nullptr) run(data_of(*z), p.y_group, m.projections);
  p.residual_group = p.y_group;
  if (m.roots != nullptr) {
    p.residual = data_of(*z);
    const Tensor before = *z;  // lives until it is added
    run(embedded, 0, m.roots);
  }
  return *z;
}

Tensor medusa_draft(Tensor hidden, Tensor root, Tensor depths, Tensor ranks, Tensor weight, Tensor bias,
                    OptionalTensor projections, OptionalTensor roots, OptionalTensor embedding, Tensor lm_head,
                    OptionalTensor vocabulary) {
  const Backend backend(op);
  const Arg h(op, "hidden", hidden), r(op, "root", root), w(op, "weight", weight), c(op, "bias", bias),
      l(op, "lm_head", lm_head);
  h.dtype();
  h.rank(2, "[B, d]");
  const int64_t batch = h.size(0), d = h.size(1);
  EFFOPS_CHECK(d > 0, op, ": hidden: expected d >= 1, got shape ", h.shape());
  r.is(type_int64(), "int64").same_device(h);
  check_shape(r, {{"B", batch}});
  w.same_dtype(h).same_device(h);
  check_shape(w, {{"layers", -1}, {"K", -1}, {"d", d}, {"d", d}});
  const int64_t layers = w.size(0), heads = w.size(1);
  EFFOPS_CHECK(layers > 0 && heads > 0, op, ": weight: expected a layer and a head or more, got shape ", w.shape());
  c.same_dtype(h).same_device(h);
  check_shape(c, {{"layers", layers}, {"K", heads}, {"d", d}});
  l.same_dtype(h).same_device(h);
  EFFOPS_CHECK(l.dim == 2 || l.dim == 3, op, ": lm_head: expected shape [V, d] or [K, V, d], got ", l.shape());
  if (l.dim == 2) check_shape(l, {{"V", -1}, {"d", d}});
  if (l.dim == 3) check_shape(l, {{"K", heads}, {"V", -1}, {"d", d}});
  const int64_t vocab = l.size(l.dim - 2);
  auto matrices = [&](const char* name, OptionalTensor& t) -> const char* {
    if (!t) return nullptr;
    const Arg a(op, name, *t);
    a.same_dtype(h).same_device(h);
    check_shape(a, {{"K", heads}, {"d", d}, {"d", d}});
    return contiguous_data(a, *t);
  };
  Heads m{
      h.dtype(), 0, layers, heads, d, nullptr, nullptr, matrices("projections", projections), matrices("roots", roots)};
  EFFOPS_CHECK(roots.has_value() == embedding.has_value(), op, ": embedding: expected ",
               roots ? "a tensor beside roots, got none" : "none without roots, got a tensor");
  std::vector<char> embedded;  // the embeddings of the roots in line
  if (embedding) {
    Arg a(op, "embedding", *embedding);
    a.same_dtype(h).same_device(h);
    check_shape(a, {{"tokens", -1}, {"d", d}});
    if (d > 1 && a.stride(1) != 1) {
      embedding = torch::stable::contiguous(*embedding);
      a = Arg(op, "embedding", *embedding);
    }
    const int64_t item = size_of(h.dtype());
    embedded.resize(static_cast<size_t>(batch * d * item));
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t token = reinterpret_cast<const int64_t*>(r.data())[b * r.stride(0)];
      EFFOPS_CHECK(token < a.size(0), op, ": root: expected values below ", a.size(0), " (rows of embedding), got ",
                   token, " at index ", b);
      if (token >= 0) std::memcpy(embedded.data() + b * d * item, a.data() + token * a.stride(0) * item, d * item);
    }
  }
  const int64_t* names = nullptr;
  if (vocabulary) {
    const Arg a(op, "vocabulary", *vocabulary);
    a.is(type_int64(), "int64").same_device(h);
    check_shape(a, {{"V", vocab}});
    names = reinterpret_cast<const int64_t*>(contiguous_data(a, *vocabulary));
  }
  const Arg depth_arg(op, "depths", depths);
  const Values<int32_t> depth(op, "depths", depths, {"T", -1}, h);
  const int64_t nodes = depth.count();
  EFFOPS_CHECK(nodes > 0, op, ": depths: expected a node or more, got shape ", depth_arg.shape());
  const Values<int32_t> rank(op, "ranks", ranks, {"T", nodes}, h);
  EFFOPS_CHECK(depth.get()[0] == 0, op, ": depths: expected 0 for the root, got ", depth.get()[0], " at index 0");
  int64_t deepest = 0, best = 1;
  for (int64_t i = 1; i < nodes; ++i) {
    EFFOPS_CHECK(depth.get()[i] > 0 && depth.get()[i] <= heads, op, ": depths: expected values in [1, ", heads,
                 "] (K), got ", depth.get()[i], " at index ", i);
    EFFOPS_CHECK(rank.get()[i] >= 0 && rank.get()[i] < vocab, op, ": ranks: expected values in [0, ", vocab,
                 ") (V), got ", rank.get()[i], " at index ", i);
    deepest = std::max<int64_t>(deepest, depth.get()[i]);
    best = std::max<int64_t>(best, rank.get()[i] + 1);
  }

  Tensor out = empty({batch, nodes}, type_int64(), h);
  Tensor likeliest = empty({deepest, batch, best}, type_int64(), h);
  if (deepest > 0 && batch > 0) {
    m.heads = deepest;
    m.weight = contiguous_data(w, weight);
    m.bias = contiguous_data(c, bias);
    const char* const first = contiguous_data(h, hidden);
    FlawedRow flawed;
    SamplingProblem best_of;
    best_of.dtype = h.dtype();
    best_of.rows = {{1, 1, deepest * batch}, {0, 0, vocab}};
    best_of.size = vocab;
    best_of.best = best;
    best_of.tokens = reinterpret_cast<int64_t*>(data_of(likeliest));
    best_of.flawed = &flawed;
    LinearProblem last;  // the LM heads side by side, or one over the rows of all heads
    last.dtype = h.dtype();
    last.groups = l.dim == 3 ? deepest : 1;
    last.rows = deepest * batch / last.groups;
    last.in = last.x_row = last.weight_row = d;
    last.out = last.y_row = vocab;
    last.x_group = last.rows * d;
    last.weight_group = vocab * d;
    last.y_group = last.rows * vocab;
    const bool streams = l.dim == 3 || streams_linear(last.dtype, last.rows, false);
    if (streams) last.weight = contiguous_data(l, lm_head);
    std::optional<Tensor> z, logits;
    with_team(torch_threads(), [&](const Parallel& parallel) {
      z = states(m, h, first, embedded.data(), batch, parallel);
      if (!streams) return;
      logits = empty({deepest, batch, vocab}, h.type, h);
      last.x = data_of(*z);
      last.y = data_of(*logits);
      best_of.x = last.y;
      cpu::kernels().linear(last, parallel);
      cpu::kernels().sampling(best_of, parallel);
    });
    if (!streams) {
      logits = packed_linear(*z, lm_head, {}, {}, {}, 0, false);
      best_of.x = data_of(*logits);
      cpu::kernels().sampling(best_of, torch_threads());
    }
    EFFOPS_CHECK(!flawed.any(), op, ": hidden: expected logits without NaN and inf, got ",
                 flawed.flaw() == RowFlaw::nan        ? "NaN"
                 : flawed.flaw() == RowFlaw::infinite ? "inf"
                                                      : "-inf only",
                 " in head ", flawed.row() / batch, " of sequence ", flawed.row() % batch);
  }
  const int64_t* found = reinterpret_cast<const int64_t*>(data_of(likeliest));
  int64_t* to = reinterpret_cast<int64_t*>(data_of(out));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < nodes; ++i) {
      int64_t token = std::max<int64_t>(reinterpret_cast<const int64_t*>(r.data())[b * r.stride(0)], -1);
      if (i > 0 && token >= 0) {
        token = found[((depth.get()[i] - 1) * batch + b) * best + rank.get()[i]];
        if (names != nullptr) token = names[token];
      }
      to[b * nodes + i] = token;
    }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("medusa_draft", TORCH_BOX(&medusa_draft)); }

}  // namespace effops::ops
