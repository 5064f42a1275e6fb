// decoder_layer and decoder on the CPU: a layer of the Llama family over a cache, or a whole forward pass, in one call.
#include <cmath>
#include <cstring>

#include "common/scratch.h"
#include "common/team.h"
#include "cpu/kernels.h"
#include "ops/cache.h"
#include "ops/packed.h"
#include "ops/threads.h"

namespace effops::ops {
namespace {

// A tensor and its facts, which cost a tenth of a microsecond to ask for.
struct Weight {
  Weight(const char* op, const char* name, const Tensor& t) : tensor(t), arg(op, name, tensor) {}
  Tensor tensor;
  Arg arg;
  std::optional<PackedMatrix> packed;  // a matrix in few bits, once it was checked
};
using OptionalWeight = std::optional<Weight>;

OptionalWeight given(const char* op, const char* name, const OptionalTensor& t) {
  return t ? OptionalWeight(std::in_place, op, name, *t) : std::nullopt;
}

struct LayerWeights {
  Weight attention_norm, qkv, o, mlp_norm, gate_up, down;
  OptionalWeight qkv_bias, o_bias, gate_up_bias, down_bias;
  int64_t window;
};

void check_weight(const Arg& weight, const Arg& like, std::initializer_list<Extent> shape) {
  weight.same_dtype(like).same_device(like);
  check_shape(weight, shape);
}

// rows.value < 0 accepts any.
void check_matrix(Weight& weight, const Arg& like, Extent rows, Extent columns) {
  if (!is_packed(weight.arg)) return check_weight(weight.arg, like, {rows, columns});
  check_shape(weight.arg, {rows, {"row bytes", -1}});
  weight.packed = packed_matrix(weight.arg, columns.value, like);
}

void check_bias(const OptionalWeight& bias, const Arg& like, int64_t size) {
  if (bias) check_weight(bias->arg, like, {{"N", size}});
}

// Rows [B, T, heads, dim] in line.
TensorView4 in_line(char* data, int64_t tokens, int64_t heads, int64_t dim) {
  return {data, tokens * heads * dim, heads * dim, dim, 1};
}

// The end of a forward pass: the norm of the last layer's output, and its logits.
struct Head {
  Weight norm, lm_head;
  Tensor hidden, logits;
};

// What all layers of a forward pass share, checked once.
class Pass {
 public:
  const char *op, *window_name;
  bool invariant;  // a row's bits do not depend on the number of rows
  Arg a;           // x [B, T, d]
  int64_t batch, tokens, width, heads, kv_heads, dim, kv_capacity;
  double norm_eps;
  Values<int32_t> lens;
  std::optional<TreeMask> mask;
  RotaryAppendProblem turn;
  AttentionProblem p;

  // k and v [B, L, G, D], or [P, page, G, D] beside a page table: one layer's; `qkv` gives the number of heads.
  Pass(const char* op_, const char* name, const Tensor& x, const Tensor& qkv, const Arg& k, const Arg& v, Tensor& cos,
       Tensor& sin, const Tensor& positions, const Tensor& slots, const Tensor& kv_lens, double eps,
       std::optional<int64_t> max_kv_len, const OptionalTensor& page_table, const OptionalTensor& ancestors,
       const OptionalTensor& depths, bool batch_invariant, const char* window_name_)
      : op(op_),
        window_name(window_name_),
        invariant(batch_invariant),
        a(op, name, x),
        norm_eps(eps),
        lens(op, "kv_lens", kv_lens, {"B", rows(a)}, a) {
    const Arg w(op, "qkv", qkv);
    const DType dtype = a.dtype();
    batch = a.size(0);
    tokens = a.size(1);
    width = a.size(2);
    EFFOPS_CHECK(width > 0, op, ": x: expected d >= 1, got shape ", a.shape());
    k.same_dtype(a).same_device(a);
    const CacheShape cache = cache_shape(k, v, page_table, batch);
    kv_capacity = cache.capacity;
    kv_heads = cache.heads;
    dim = k.size(3);
    check_weight(v, a, {{page_table ? "P" : "B", -1}, {page_table ? "page" : "L", -1}, {"G", -1}, {"D", dim}});
    w.rank(2, "[(H + 2G) * D, d]");
    heads = dim > 0 ? w.size(0) / dim - 2 * kv_heads : 0;
    EFFOPS_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && (heads + 2 * kv_heads) * dim == w.size(0), op,
                 ": qkv: expected (H + 2G) * D rows with H a multiple of G for a cache of G = ", kv_heads,
                 " heads of D = ", dim, ", got shape ", w.shape());
    const int64_t longest = max_kv_len ? std::min(*max_kv_len, kv_capacity) : kv_capacity;
    check_range(op, "kv_lens", lens, 0, longest, longest < kv_capacity ? "max_kv_len" : "L");

    turn.dtype = dtype;
    turn.batch = batch;
    turn.tokens = tokens;
    turn.heads = heads;
    turn.kv_heads = kv_heads;
    turn.dim = dim;
    turn.pages = cache.pages;
    turn.slots = slots_of(Arg(op, "slots", slots), a, cache, batch, tokens);
    turn.angles = angles_of(a, batch, tokens, dim, cos, sin, positions);

    p.dtype = dtype;
    p.batch = batch;
    p.heads = heads;
    p.kv_heads = kv_heads;
    p.head_dim = p.v_dim = dim;
    p.q_len = tokens;
    p.kv_capacity = kv_capacity;
    p.kv_lens = lens.get();
    p.pages = cache.pages;
    p.scale = 1.0 / std::sqrt(static_cast<double>(dim));
    EFFOPS_CHECK(ancestors || !depths, op, ": depths: expected none without ancestors, got a tensor");
    if (ancestors) {
      mask.emplace(a, *ancestors, depths, p, nullptr);
      p.tree = mask->get();
      for (int64_t b = 0; b < batch; ++b)
        EFFOPS_CHECK(lens.get()[b] == 0 || lens.get()[b] >= tokens, op,
                     ": kv_lens: expected 0 or at least the tree's T = ", tokens, ", got ", lens.get()[b],
                     " for sequence ", b);
    }
    p.causal = !ancestors;
    if (p.pages.given()) check_pages(op, "page_table", p, cache.page_count);
  }

  static int64_t rows(const Arg& x) {
    x.dtype();
    x.rank(3, "[B, T, d]");
    return x.size(0);
  }

  void check(LayerWeights& w) {
    check_matrix(w.qkv, a, {"(H + 2G) * D", (heads + 2 * kv_heads) * dim}, {"d", width});
    check_matrix(w.gate_up, a, {"2f", -1}, {"d", width});
    const int64_t up = w.gate_up.arg.size(0);
    EFFOPS_CHECK(up % 2 == 0, op, ": gate_up: expected an even number of rows, got shape ", w.gate_up.arg.shape());
    check_weight(w.attention_norm.arg, a, {{"d", width}});
    check_weight(w.mlp_norm.arg, a, {{"d", width}});
    check_matrix(w.o, a, {"d", width}, {"H * D", heads * dim});
    check_matrix(w.down, a, {"d", width}, {"f", up / 2});
    check_bias(w.qkv_bias, a, (heads + 2 * kv_heads) * dim);
    check_bias(w.o_bias, a, width);
    check_bias(w.gate_up_bias, a, up);
    check_bias(w.down_bias, a, width);
    EFFOPS_CHECK(w.window >= 0, op, ": ", window_name, ": expected 0 (off) or more, got ", w.window);
    widest = std::max(widest, up);
    for (const Weight* m : {&w.attention_norm, &w.qkv, &w.o, &w.mlp_norm, &w.gate_up, &w.down}) note_order(m->arg);
    for (const OptionalWeight* m : {&w.qkv_bias, &w.o_bias, &w.gate_up_bias, &w.down_bias})
      if (*m) note_order((*m)->arg);
  }

  void check(Head& head) {
    check_weight(head.norm.arg, a, {{"d", width}});
    check_matrix(head.lm_head, a, {"V", -1}, {"d", width});
    note_order(head.norm.arg);
    note_order(head.lm_head.arg);
  }

  // The layers one after the other, layer i over the cache at k and v plus i times their steps in bytes, and the head
  // where there is one.
  Tensor run(Tensor x, const std::vector<LayerWeights>& layers, TensorView4 k, TensorView4 v, int64_t k_step,
             int64_t v_step, Head* head) {
    if (dim == 1) k.dim = v.dim = 1;
    if (streams_linear(p.dtype, batch * tokens, invariant) && in_memory_order)
      return stream(x, layers, k, v, k_step, v_step, head);
    for (const LayerWeights& w : layers) {
      x = by_ops(x, w, k, v);
      k.data += k_step;
      v.data += v_step;
    }
    if (head != nullptr) {
      head->hidden = rms_norm(x, head->norm.tensor, norm_eps, 0);
      head->logits = packed_linear(head->hidden, head->lm_head.tensor, {}, {}, {}, 0, false, false, invariant);
    }
    return x;
  }

 private:
  void note_order(const Arg& t) {
    in_memory_order = in_memory_order && (t.stride(t.dim - 1) == 1 || t.size(t.dim - 1) == 1);
  }

  // rotary_append and attention from `projected` rows to `mixed` ones; q and lse are room for what lies between.
  void attend(const char* projected, char* q, char* mixed, char* lse, const TensorView4& k, const TensorView4& v,
              int64_t window, const Parallel& parallel) {
    const TensorView4 all = in_line(nullptr, tokens, heads + 2 * kv_heads, dim);
    turn.x = projected;
    turn.x_batch = all.batch;
    turn.x_token = all.token;
    turn.x_head = all.head;
    turn.q = q;
    turn.k = p.k = k;
    turn.v = p.v = v;
    cpu::kernels().rotary_append(turn, parallel);
    p.window = window;
    p.q = in_line(q, tokens, heads, dim);
    p.out = in_line(mixed, tokens, heads, dim);
    p.lse = {lse, tokens * heads, heads, 1};
    cpu::kernels().attention(p, parallel);
  }

  Tensor by_ops(const Tensor& x, const LayerWeights& w, const TensorView4& k, const TensorView4& v) {
    auto linear = [&](const Tensor& in, const Weight& weight, const OptionalWeight& bias, OptionalTensor residual,
                      OptionalTensor norm, bool gated) {
      return packed_linear(in, weight.tensor, bias ? OptionalTensor(bias->tensor) : std::nullopt, residual, norm,
                           norm_eps, gated, false, invariant);
    };
    const Tensor projected = linear(x, w.qkv, w.qkv_bias, {}, w.attention_norm.tensor, false);
    Tensor q = empty({batch, tokens, heads, dim}, a.type, a), mixed = empty({batch, tokens, heads * dim}, a.type, a);
    Tensor lse = empty({batch, tokens, heads}, p.dtype == DType::f64 ? type_of(DType::f64) : type_float32(), a);
    attend(Arg(op, "qkv", projected).data(), Arg(op, "q", q).mutable_data(), Arg(op, "out", mixed).mutable_data(),
           Arg(op, "lse", lse).mutable_data(), k, v, w.window, torch_threads());
    const Tensor attended = linear(mixed, w.o, w.o_bias, x, {}, false);
    const Tensor hidden = linear(attended, w.gate_up, w.gate_up_bias, {}, w.mlp_norm.tensor, false);
    return linear(hidden, w.down, w.down_bias, attended, {}, true);
  }

  // The same for few rows, without a tensor between the steps and in one parallel region: at this size an allocation
  // and the start of a region cost as much as a step.
  Tensor stream(Tensor x, const std::vector<LayerWeights>& layers, TensorView4 k, TensorView4 v, int64_t k_step,
                int64_t v_step, Head* head) {
    const int64_t rows = batch * tokens, item = size_of(p.dtype);
    const char* in = contiguous_data(a, x);
    Tensor out = empty({batch, tokens, width}, a.type, a);
    if (head != nullptr) {
      head->hidden = empty({batch, tokens, width}, a.type, a);
      head->logits = empty({batch, tokens, head->lm_head.arg.size(0)}, a.type, a);
    }
    Carver measure;
    char *projected, *q, *mixed, *lse, *attended, *hidden, *between;
    auto carve = [&](Carver& c) {
      projected = c.take<char>(rows * (heads + 2 * kv_heads) * dim * item);
      q = c.take<char>(rows * heads * dim * item);
      mixed = c.take<char>(rows * heads * dim * item);
      lse = c.take<char>(rows * heads * sizeof(double));
      attended = c.take<char>(rows * width * item);
      hidden = c.take<char>(rows * widest * item);
      between = c.take<char>(rows * width * item);
    };
    carve(measure);
    Tensor memory = empty({static_cast<int64_t>(measure.used() / sizeof(int64_t))}, type_int64(), a);
    Carver carver(Arg(op, "memory", memory).mutable_data());
    carve(carver);
    char* const last = Arg(op, "out", out).mutable_data();
    with_team(torch_threads(), [&](const Parallel& parallel) {
      auto linear = [&](const char* x, const Weight& weight, const OptionalWeight& bias, const char* residual,
                        const Weight* norm, bool gated, char* y) {
        const std::optional<PackedMatrix>& packed = weight.packed;
        LinearProblem l;
        l.dtype = p.dtype;
        l.rows = rows;
        l.out = l.residual_row = l.y_row = weight.arg.size(0);
        l.in = packed ? packed->in : weight.arg.size(1);
        l.x = x;
        l.x_row = gated ? 2 * l.in : l.in;
        l.bias = bias ? bias->arg.data() : nullptr;
        l.residual = residual;
        l.norm = norm != nullptr ? norm->arg.data() : nullptr;
        l.norm_eps = norm_eps;
        l.gated = gated;
        l.y = y;
        if (packed) return cpu::kernels().packed_linear({l, *packed, false, invariant}, parallel);
        l.weight = weight.arg.data();
        l.weight_row = weight.arg.stride(0);
        cpu::kernels().linear(l, parallel);
      };
      for (size_t i = 0; i < layers.size(); ++i) {
        const LayerWeights& w = layers[i];
        char* const y = (layers.size() - i) % 2 == 1 ? last : between;  // the last one to `last`
        linear(in, w.qkv, w.qkv_bias, nullptr, &w.attention_norm, false, projected);
        attend(projected, q, mixed, lse, k, v, w.window, parallel);
        linear(mixed, w.o, w.o_bias, in, nullptr, false, attended);
        linear(attended, w.gate_up, w.gate_up_bias, nullptr, &w.mlp_norm, false, hidden);
        linear(hidden, w.down, w.down_bias, attended, nullptr, true, y);
        in = y;
        k.data += k_step;
        v.data += v_step;
      }
      if (head == nullptr) return;
      const RowSpace space{{1, 1, rows}, {0, 0, width}};
      char* const normed = Arg(op, "hidden", head->hidden).mutable_data();
      cpu::kernels().rms_norm({p.dtype, space, width, norm_eps, 0, in, head->norm.arg.data(), normed}, parallel);
      linear(normed, head->lm_head, {}, nullptr, nullptr, false, Arg(op, "logits", head->logits).mutable_data());
    });
    return out;
  }

  int64_t widest = 0;           // rows of gate_up
  bool in_memory_order = true;  // rows of all weights
};

Tensor decoder_layer(Tensor x, Tensor attention_norm, Tensor qkv, OptionalTensor qkv_bias, Tensor o,
                     OptionalTensor o_bias, Tensor mlp_norm, Tensor gate_up, OptionalTensor gate_up_bias, Tensor down,
                     OptionalTensor down_bias, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache,
                     Tensor slots, Tensor kv_lens, double norm_eps, int64_t window, std::optional<int64_t> max_kv_len,
                     OptionalTensor page_table, OptionalTensor ancestors, OptionalTensor depths, bool batch_invariant) {
  const char* op = "decoder_layer";
  const Backend backend(op);
  const Arg k(op, "k_cache", k_cache), v(op, "v_cache", v_cache);
  Pass pass(op, "x", x, qkv, k, v, cos, sin, positions, slots, kv_lens, norm_eps, max_kv_len, page_table, ancestors,
            depths, batch_invariant, "window");
  std::vector<LayerWeights> layers{{{op, "attention_norm", attention_norm},
                                    {op, "qkv", qkv},
                                    {op, "o", o},
                                    {op, "mlp_norm", mlp_norm},
                                    {op, "gate_up", gate_up},
                                    {op, "down", down},
                                    given(op, "qkv_bias", qkv_bias),
                                    given(op, "o_bias", o_bias),
                                    given(op, "gate_up_bias", gate_up_bias),
                                    given(op, "down_bias", down_bias),
                                    window}};
  pass.check(layers[0]);
  return pass.run(x, layers, view4(k, k.mutable_data()), view4(v, v.mutable_data()), 0, 0, nullptr);
}

using Tensors = std::vector<Tensor>;

// The rows of the embedding that tokens [B, T] name.
Tensor embed(const char* op, const Tensor& tokens, Tensor embedding) {
  const Arg t(op, "tokens", tokens), e(op, "embedding", embedding);
  t.is(type_int64(), "int64").rank(2, "[B, T]");
  e.dtype();
  e.same_device(t).rank(2, "[V, d]");
  const int64_t row = e.size(1) * size_of(e.dtype());
  const char* from = contiguous_data(e, embedding);
  Tensor x = empty({t.size(0), t.size(1), e.size(1)}, e.type, e);
  char* to = Arg(op, "x", x).mutable_data();
  for (int64_t b = 0; b < t.size(0); ++b)
    for (int64_t i = 0; i < t.size(1); ++i, to += row) {
      const int64_t token = reinterpret_cast<const int64_t*>(t.data())[b * t.stride(0) + i * t.stride(1)];
      EFFOPS_CHECK(token >= 0 && token < e.size(0), op, ": tokens: expected values in [0, ", e.size(0), ") (V), got ",
                   token, " at index [", b, ", ", i, "]");
      std::memcpy(to, from + token * row, static_cast<size_t>(row));
    }
  return x;
}

std::tuple<Tensor, Tensor> decoder(Tensor tokens, Tensor embedding, Tensors attention_norm, Tensors qkv,
                                   Tensors qkv_bias, Tensors o, Tensors o_bias, Tensors mlp_norm, Tensors gate_up,
                                   Tensors gate_up_bias, Tensors down, Tensors down_bias, Tensor norm, Tensor lm_head,
                                   Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache,
                                   Tensor slots, Tensor kv_lens, std::vector<int64_t> windows, double norm_eps,
                                   std::optional<int64_t> max_kv_len, OptionalTensor page_table,
                                   OptionalTensor ancestors, OptionalTensor depths, bool batch_invariant) {
  const char* op = "decoder";
  const Backend backend(op);
  const Tensor x = embed(op, tokens, embedding);
  const Arg all_k(op, "k_cache", k_cache), all_v(op, "v_cache", v_cache);
  const char* layout = page_table ? "[layers, P, page, G, D]" : "[layers, B, L, G, D]";
  const int64_t count = static_cast<int64_t>(windows.size());
  EFFOPS_CHECK(count > 0, op, ": windows: expected a layer or more, got none");
  auto listed = [&](const char* name, const Tensors& list, bool may_lack) {
    const int64_t n = static_cast<int64_t>(list.size());
    EFFOPS_CHECK(n == count || (may_lack && n == 0), op, ": ", name, ": expected a tensor a layer, ", count,
                 may_lack ? ", or none" : "", ", got ", n);
  };
  listed("attention_norm", attention_norm, false);
  listed("qkv", qkv, false);
  listed("qkv_bias", qkv_bias, true);
  listed("o", o, false);
  listed("o_bias", o_bias, true);
  listed("mlp_norm", mlp_norm, false);
  listed("gate_up", gate_up, false);
  listed("gate_up_bias", gate_up_bias, true);
  listed("down", down, false);
  listed("down_bias", down_bias, true);
  for (const Arg* cache : {&all_k, &all_v}) {
    cache->rank(5, layout);
    EFFOPS_CHECK(cache->size(0) == count, op, ": ", cache->name, ": expected ", count,
                 " layers, as many as windows, got shape ", cache->shape());
  }
  const Arg k = at_first(all_k), v = at_first(all_v);
  Pass pass(op, "embedding", x, qkv[0], k, v, cos, sin, positions, slots, kv_lens, norm_eps, max_kv_len, page_table,
            ancestors, depths, batch_invariant, "windows");
  auto at = [](const Tensors& list, int64_t i) { return list.empty() ? OptionalTensor() : OptionalTensor(list[i]); };
  std::vector<LayerWeights> layers;
  layers.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back({{op, "attention_norm", attention_norm[i]},
                      {op, "qkv", qkv[i]},
                      {op, "o", o[i]},
                      {op, "mlp_norm", mlp_norm[i]},
                      {op, "gate_up", gate_up[i]},
                      {op, "down", down[i]},
                      given(op, "qkv_bias", at(qkv_bias, i)),
                      given(op, "o_bias", at(o_bias, i)),
                      given(op, "gate_up_bias", at(gate_up_bias, i)),
                      given(op, "down_bias", at(down_bias, i)),
                      windows[i]});
    pass.check(layers.back());
  }
  Head head{{op, "norm", norm}, {op, "lm_head", lm_head}, x, x};
  pass.check(head);
  const int64_t item = size_of(pass.p.dtype);
  pass.run(x, layers, view4(k, all_k.mutable_data()), view4(v, all_v.mutable_data()), all_k.stride(0) * item,
           all_v.stride(0) * item, &head);
  return {head.hidden, head.logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
  m.impl("decoder", TORCH_BOX(&decoder));
}

}  // namespace effops::ops
