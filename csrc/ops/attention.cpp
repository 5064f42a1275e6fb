// attention and varlen_attention, forward and backward.
#include "ops/attention.h"

namespace effops::ops {
namespace {

// Shapes of q, k, v; lengths; the problem's input side.
struct Inputs {
  Arg q, k, v;
  AttentionProblem p;

  Inputs(const Backend& backend, const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_, bool ragged)
      : q(op, "q", q_), k(op, "k", k_), v(op, "v", v_) {
    p.dtype = q.dtype();
    check_attention_dtype(backend, q);
    k.same_dtype(q).same_device(q);
    v.same_dtype(q).same_device(q);
    const int64_t at = ragged ? 0 : 1;  // where the token dimension is
    q.rank(at + 3, ragged ? "[N, H, D]" : "[B, T, H, D]");
    k.rank(at + 3, ragged ? "[M, G, D]" : "[B, L, G, D]");
    p.head_dim = q.size(at + 2);
    p.heads = q.size(at + 1);
    p.kv_heads = k.size(at + 1);
    if (ragged) {
      check_shape(k, {{"M", -1}, {"G", -1}, {"D", p.head_dim}});
      check_shape(v, {{"M", k.size(0)}, {"G", p.kv_heads}, {"Dv", -1}});
    } else {
      p.batch = q.size(0);
      p.q_len = q.size(1);
      p.kv_capacity = k.size(1);
      check_shape(k, {{"B", p.batch}, {"L", -1}, {"G", -1}, {"D", p.head_dim}});
      check_shape(v, {{"B", p.batch}, {"L", p.kv_capacity}, {"G", p.kv_heads}, {"Dv", -1}});
    }
    p.v_dim = v.size(at + 2);
    EFFOPS_CHECK(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, op,
                 ": k: expected a number of KV heads that divides H = ", p.heads, ", got G = ", p.kv_heads);
    EFFOPS_CHECK(p.head_dim > 0, op, ": q: expected D >= 1, got shape ", q.shape());
    p.q = ragged ? view3(q, unconst(q.data())) : view4(q, unconst(q.data()));
    p.k = ragged ? view3(k, unconst(k.data())) : view4(k, unconst(k.data()));
    p.v = ragged ? view3(v, unconst(v.data())) : view4(v, unconst(v.data()));
  }

  AttentionLimits limits(bool ragged, std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len) const {
    const int64_t most_q = ragged ? q.size(0) : p.q_len, most_k = ragged ? k.size(0) : p.kv_capacity;
    AttentionLimits l;
    l.q_rows = ragged ? q.size(0) : 0;
    l.k_rows = ragged ? k.size(0) : 0;
    l.max_q_len = std::min(most_q, max_q_len.value_or(most_q));
    l.max_kv_len = std::min(most_k, max_kv_len.value_or(most_k));
    return l;
  }
};

void check_lengths(const char* op, const AttentionOptions& o, int64_t capacity, std::optional<int64_t> max_kv_len) {
  const bool bounded = max_kv_len && o.kv_lens.get() && *max_kv_len < capacity;
  check_range(op, "kv_lens", o.kv_lens, 0, bounded ? *max_kv_len : capacity, bounded ? "max_kv_len" : "L");
  check_range(op, "kv_starts", o.kv_starts, 0, capacity, "L");
}

struct Ragged {
  Values<int32_t> cu_q, cu_k;

  Ragged(const char* op, Inputs& in, const Tensor& cu_q_, const Tensor& cu_k_, std::optional<int64_t> max_q_len,
         std::optional<int64_t> max_kv_len)
      : cu_q(op, "cu_seqlens_q", cu_q_, {"B + 1", -1}, in.q),
        cu_k(op, "cu_seqlens_k", cu_k_, {"B + 1", cu_q.count()}, in.q) {
    EFFOPS_CHECK(cu_q.count() > 0, op, ": cu_seqlens_q: expected shape [B + 1], got [0]");
    check_offsets(op, "cu_seqlens_q", cu_q, in.q.size(0), max_q_len, "max_q_len");
    check_offsets(op, "cu_seqlens_k", cu_k, in.k.size(0), max_kv_len, "max_kv_len");
    in.p.batch = cu_q.count() - 1;
    in.p.cu_q = cu_q.get();
    in.p.cu_k = cu_k.get();
  }
};

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, OptionalTensor kv_lens, OptionalTensor kv_starts,
                                     bool causal, int64_t window, int64_t num_sinks, OptionalTensor prefix_lens,
                                     OptionalTensor head_windows, OptionalTensor sink_logits, double softcap,
                                     std::optional<double> scale, std::optional<int64_t> max_kv_len) {
  const char* op = "attention";
  const Backend backend(op, q);
  Inputs in(backend, op, q, k, v, false);
  AttentionProblem& p = in.p;
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, kv_lens, kv_starts, causal, window, num_sinks,
                                 prefix_lens, head_windows, sink_logits, softcap, scale);
  check_lengths(op, options, p.kv_capacity, max_kv_len);
  options.apply(p);
  // Without kv_lens every sequence has all keys, whatever max_kv_len says.
  return run_attention(backend, in.q, p, in.limits(false, std::nullopt, kv_lens ? max_kv_len : std::nullopt));
}

std::tuple<Tensor, Tensor> varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                            OptionalTensor kv_starts, bool causal, int64_t window, int64_t num_sinks,
                                            OptionalTensor prefix_lens, OptionalTensor head_windows,
                                            OptionalTensor sink_logits, double softcap, std::optional<double> scale,
                                            std::optional<int64_t> max_q_len, std::optional<int64_t> max_kv_len) {
  const char* op = "varlen_attention";
  const Backend backend(op, q);
  Inputs in(backend, op, q, k, v, true);
  AttentionProblem& p = in.p;
  const Ragged ragged(op, in, cu_seqlens_q, cu_seqlens_k, max_q_len, max_kv_len);
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, causal, window,
                                 num_sinks, prefix_lens, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, in.k.size(0), "M");
  options.apply(p);
  return run_attention(backend, in.q, p, in.limits(true, max_q_len, max_kv_len));
}

// The shared tail of both backward ops: gradients dq, dk, dv and the sink gradient per sequence.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Backend& backend, const char* op, Inputs& in, bool ragged,
                                                        const Tensor& out, const Tensor& lse, const Tensor& d_out,
                                                        const OptionalTensor& d_lse) {
  AttentionProblem& p = in.p;
  const Arg o(op, "out", out), l(op, "lse", lse), g_out(op, "d_out", d_out);
  auto view = [&](const Arg& a, const char* data) {
    return ragged ? view3(a, unconst(data)) : view4(a, unconst(data));
  };
  auto rows = [&](const Arg& a) { return ragged ? rows2(a, unconst(a.data())) : rows3(a, unconst(a.data())); };
  auto same = [&](const Arg& a, int64_t last) {
    if (ragged) {
      check_shape(a, {{"N", in.q.size(0)}, {"H", p.heads}, {"Dv", last}});
    } else {
      check_shape(a, {{"B", p.batch}, {"T", p.q_len}, {"H", p.heads}, {"Dv", last}});
    }
    a.same_dtype(in.q).same_device(in.q);
  };
  auto same_rows = [&](const Arg& a) {
    if (ragged) {
      check_shape(a, {{"N", in.q.size(0)}, {"H", p.heads}});
    } else {
      check_shape(a, {{"B", p.batch}, {"T", p.q_len}, {"H", p.heads}});
    }
    a.is(lse_type(p.dtype), p.dtype == DType::f64 ? "float64" : "float32").same_device(in.q);
  };
  same(o, p.v_dim);
  same(g_out, p.v_dim);
  same_rows(l);
  p.out = view(o, o.data());
  p.lse = rows(l);
  AttentionGradients g;
  g.d_out = view(g_out, g_out.data());
  if (d_lse) {
    const Arg a(op, "d_lse", *d_lse);
    same_rows(a);
    g.d_lse = rows(a);
  }
  auto gradient = [&](const Arg& like, TensorView4& to, const char* name) {
    char* data = nullptr;
    Tensor t = zeros(like, name, std::vector<int64_t>(like.sizes, like.sizes + like.dim), like.type, data);
    to = view(Arg(op, name, t), data);
    return t;
  };
  Tensor dq = gradient(in.q, g.dq, "dq"), dk = gradient(in.k, g.dk, "dk"), dv = gradient(in.v, g.dv, "dv");
  char* sinks = nullptr;
  Tensor dsink = zeros(in.q, "dsink", {p.sink_logits ? p.batch : 0, p.heads}, lse_type(p.dtype), sinks);
  g.dsink = p.sink_logits ? sinks : nullptr;
  run_attention_backward(backend, in.q, p, g, in.limits(ragged, std::nullopt, std::nullopt));
  return {dq, dk, dv, dsink};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k,
                                                              Tensor v, Tensor out, Tensor lse, OptionalTensor kv_lens,
                                                              OptionalTensor kv_starts, bool causal, int64_t window,
                                                              int64_t num_sinks, OptionalTensor prefix_lens,
                                                              OptionalTensor head_windows, OptionalTensor sink_logits,
                                                              double softcap, std::optional<double> scale) {
  const char* op = "attention_backward";
  const Backend backend(op, q);
  Inputs in(backend, op, q, k, v, false);
  AttentionProblem& p = in.p;
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, kv_lens, kv_starts, causal, window, num_sinks,
                                 prefix_lens, head_windows, sink_logits, softcap, scale);
  check_lengths(op, options, p.kv_capacity, std::nullopt);
  options.apply(p);
  return run_backward(backend, op, in, false, out, lse, d_out, d_lse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,
    Tensor cu_seqlens_k, OptionalTensor kv_starts, bool causal, int64_t window, int64_t num_sinks,
    OptionalTensor prefix_lens, OptionalTensor head_windows, OptionalTensor sink_logits, double softcap,
    std::optional<double> scale) {
  const char* op = "varlen_attention_backward";
  const Backend backend(op, q);
  Inputs in(backend, op, q, k, v, true);
  AttentionProblem& p = in.p;
  const Ragged ragged(op, in, cu_seqlens_q, cu_seqlens_k, std::nullopt, std::nullopt);
  const AttentionOptions options(op, in.q, p.batch, p.heads, p.kv_heads, std::nullopt, kv_starts, causal, window,
                                 num_sinks, prefix_lens, head_windows, sink_logits, softcap, scale);
  check_range(op, "kv_starts", options.kv_starts, 0, in.k.size(0), "M");
  options.apply(p);
  return run_backward(backend, op, in, true, out, lse, d_out, d_lse);
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace effops::ops
