// decoder_layer on the CPU: a whole layer of the Llama family over a dense cache in one call.
#include <cmath>

#include "cpu/kernels.h"
#include "ops/cache.h"
#include "ops/threads.h"

namespace effops::ops {
namespace {

void check_weight(const Arg& weight, const Arg& like, std::initializer_list<Extent> shape) {
  weight.same_dtype(like).same_device(like);
  check_shape(weight, shape);
}

void check_bias(const char* op, const char* name, const OptionalTensor& bias, const Arg& like, int64_t size) {
  if (bias) check_weight(Arg(op, name, *bias), like, {{"N", size}});
}

// Rows [B, T, heads, dim] in line.
TensorView4 in_line(char* data, int64_t tokens, int64_t heads, int64_t dim) {
  return {data, tokens * heads * dim, heads * dim, dim, 1};
}

Tensor decoder_layer(Tensor x, Tensor attention_norm, Tensor qkv, OptionalTensor qkv_bias, Tensor o,
                     OptionalTensor o_bias, Tensor mlp_norm, Tensor gate_up, OptionalTensor gate_up_bias, Tensor down,
                     OptionalTensor down_bias, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache,
                     Tensor slots, Tensor kv_lens, double norm_eps, int64_t window, std::optional<int64_t> max_kv_len,
                     OptionalTensor page_table, OptionalTensor ancestors, OptionalTensor depths) {
  const char* op = "decoder_layer";
  const Arg a(op, "x", x), kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache), qkv_w(op, "qkv", qkv),
      up_w(op, "gate_up", gate_up);
  const DType dtype = a.dtype();
  a.rank(3, "[B, T, d]");
  const int64_t batch = a.size(0), tokens = a.size(1), width = a.size(2);
  EFFOPS_CHECK(width > 0, op, ": x: expected d >= 1, got shape ", a.shape());
  kc.same_dtype(a).same_device(a);
  const CacheShape cache = cache_shape(kc, vc, page_table, batch);
  const int64_t capacity = cache.capacity, kv_heads = cache.heads, dim = kc.size(3);
  check_weight(vc, a, {{page_table ? "P" : "B", -1}, {page_table ? "page" : "L", -1}, {"G", -1}, {"D", dim}});
  check_weight(qkv_w, a, {{"(H + 2G) * D", -1}, {"d", width}});
  const int64_t heads = dim > 0 ? qkv_w.size(0) / dim - 2 * kv_heads : 0;
  EFFOPS_CHECK(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && (heads + 2 * kv_heads) * dim == qkv_w.size(0), op,
               ": qkv: expected (H + 2G) * D rows with H a multiple of G for a cache of G = ", kv_heads,
               " heads of D = ", dim, ", got shape ", qkv_w.shape());
  check_weight(up_w, a, {{"2f", -1}, {"d", width}});
  EFFOPS_CHECK(up_w.size(0) % 2 == 0, op, ": gate_up: expected an even number of rows, got shape ", up_w.shape());
  check_weight(Arg(op, "attention_norm", attention_norm), a, {{"d", width}});
  check_weight(Arg(op, "mlp_norm", mlp_norm), a, {{"d", width}});
  check_weight(Arg(op, "o", o), a, {{"d", width}, {"H * D", heads * dim}});
  check_weight(Arg(op, "down", down), a, {{"d", width}, {"f", up_w.size(0) / 2}});
  check_bias(op, "qkv_bias", qkv_bias, a, qkv_w.size(0));
  check_bias(op, "o_bias", o_bias, a, width);
  check_bias(op, "gate_up_bias", gate_up_bias, a, up_w.size(0));
  check_bias(op, "down_bias", down_bias, a, width);
  EFFOPS_CHECK(window >= 0, op, ": window: expected 0 (off) or more, got ", window);
  const Values<int32_t> lens(op, "kv_lens", kv_lens, {"B", batch}, a);
  const int64_t longest = max_kv_len ? std::min(*max_kv_len, capacity) : capacity;
  check_range(op, "kv_lens", lens, 0, longest, longest < capacity ? "max_kv_len" : "L");

  RotaryAppendProblem turn;
  turn.dtype = dtype;
  turn.batch = batch;
  turn.tokens = tokens;
  turn.heads = heads;
  turn.kv_heads = kv_heads;
  turn.dim = dim;
  turn.pages = cache.pages;
  turn.slots = slots_of(Arg(op, "slots", slots), a, cache, batch, tokens);
  turn.angles = angles_of(a, batch, tokens, dim, cos, sin, positions);

  AttentionProblem p;
  p.dtype = dtype;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = p.v_dim = dim;
  p.q_len = tokens;
  p.kv_capacity = capacity;
  p.kv_lens = lens.get();
  p.pages = cache.pages;
  p.window = window;
  p.scale = 1.0 / std::sqrt(static_cast<double>(dim));
  EFFOPS_CHECK(ancestors || !depths, op, ": depths: expected none without ancestors, got a tensor");
  std::optional<TreeMask> mask;
  if (ancestors) {
    mask.emplace(a, *ancestors, depths, p);
    p.tree = mask->get();
    for (int64_t b = 0; b < batch; ++b)
      EFFOPS_CHECK(lens.get()[b] == 0 || lens.get()[b] >= tokens, op,
                   ": kv_lens: expected 0 or at least the tree's T = ", tokens, ", got ", lens.get()[b],
                   " for sequence ", b);
  }
  p.causal = !ancestors;
  if (p.pages.given()) check_pages(op, "page_table", p, cache.page_count);

  const Tensor projected = packed_linear(x, qkv, qkv_bias, {}, attention_norm, norm_eps, false);
  Tensor q = empty({batch, tokens, heads, dim}, a.type, a);
  const Arg rows(op, "qkv", projected);
  const TensorView4 all = in_line(nullptr, tokens, heads + 2 * kv_heads, dim);
  turn.x = rows.data();
  turn.x_batch = all.batch;
  turn.x_token = all.token;
  turn.x_head = all.head;
  turn.q = Arg(op, "q", q).mutable_data();
  turn.k = view4(kc, kc.mutable_data());
  turn.v = view4(vc, vc.mutable_data());
  if (dim == 1) turn.k.dim = turn.v.dim = 1;
  cpu::kernels().rotary_append(turn, torch_threads());

  Tensor mixed = empty({batch, tokens, heads * dim}, a.type, a);
  Tensor lse = empty({batch, tokens, heads}, dtype == DType::f64 ? type_of(DType::f64) : type_float32(), a);
  p.q = in_line(turn.q, tokens, heads, dim);
  p.k = turn.k;
  p.v = turn.v;
  p.out = in_line(Arg(op, "out", mixed).mutable_data(), tokens, heads, dim);
  p.lse = {Arg(op, "lse", lse).mutable_data(), tokens * heads, heads, 1};
  cpu::kernels().attention(p, torch_threads());

  const Tensor attended = packed_linear(mixed, o, o_bias, x, {}, 0, false);
  const Tensor hidden = packed_linear(attended, gate_up, gate_up_bias, {}, mlp_norm, norm_eps, false);
  return packed_linear(hidden, down, down_bias, attended, {}, 0, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }

}  // namespace effops::ops
