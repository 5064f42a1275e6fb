// rotary and rotary_append.
#include <torch/csrc/stable/ops.h>

#include "ops/cache.h"

namespace effops::ops {

Angles angles_of(const Arg& like, int64_t batch, int64_t tokens, int64_t dim, Tensor& cos, Tensor& sin,
                 const Tensor& positions) {
  Arg c(like.op, "cos", cos), s(like.op, "sin", sin);
  c.is(type_float32(), "float32").same_device(like);
  c.rank(2, "[P, R/2]");
  s.is(type_float32(), "float32").same_device(like);
  check_shape(s, {{"P", c.size(0)}, {"R/2", c.size(1)}});
  Angles angles;
  angles.half = c.size(1);
  angles.rows = c.size(0);
  EFFOPS_CHECK(2 * angles.half <= dim, like.op, ": cos: expected R/2 up to D/2 = ", dim / 2, ", got shape ", c.shape());
  angles.positions = token_indices(Arg(like.op, "positions", positions), like, batch, tokens, 0, c.size(0));
  for (auto [arg, tensor] : {std::pair(&c, &cos), std::pair(&s, &sin)}) {
    if (arg->stride(1) == 1 && arg->stride(0) == angles.half) continue;
    *tensor = torch::stable::contiguous(*tensor);
    *arg = Arg(like.op, arg->name, *tensor);
  }
  angles.cos = reinterpret_cast<const float*>(c.data());
  angles.sin = reinterpret_cast<const float*>(s.data());
  return angles;
}

namespace {

// x with a contiguous last dimension.
Arg with_contiguous_rows(const char* op, const char* name, Tensor& x) {
  Arg a(op, name, x);
  if (a.size(3) <= 1 || a.stride(3) == 1) return a;
  x = torch::stable::contiguous(x);
  return Arg(op, name, x);
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions) {
  const char* op = "rotary";
  const Backend backend(op, x);
  Arg a(op, "x", x);
  RotaryProblem p;
  p.dtype = a.dtype();
  a.rank(4, "[B, T, H, D]");
  p.dim = a.size(3);
  p.angles = angles_of(a, a.size(0), a.size(1), p.dim, cos, sin, positions);
  a = with_contiguous_rows(op, "x", x);
  for (int i = 0; i < 3; ++i) {
    p.rows.size[i] = a.size(i);
    p.rows.stride[i] = a.stride(i);
  }
  Tensor y = empty(with_last(a, p.dim), a.type, a);
  p.x = a.data();
  p.y = Arg(op, "y", y).mutable_data();
  backend.run(&cpu::Kernels::rotary, &DeviceLibrary::rotary, p);
  return y;
}

Tensor rotary_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache, Tensor slots,
                     OptionalTensor page_table) {
  const char* op = "rotary_append";
  const Backend backend(op, qkv);
  Arg a(op, "qkv", qkv);
  const Arg kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache);
  RotaryAppendProblem p;
  p.dtype = a.dtype();
  a.rank(4, "[B, T, H + 2G, D]");
  p.batch = a.size(0);
  p.tokens = a.size(1);
  p.dim = a.size(3);
  kc.same_dtype(a).same_device(a);
  const CacheShape cache = cache_shape(kc, vc, page_table, p.batch);
  check_shape(kc, {{page_table ? "P" : "B", -1}, {page_table ? "page" : "L", -1}, {"G", -1}, {"D", p.dim}});
  check_shape(vc, {{page_table ? "P" : "B", -1}, {page_table ? "page" : "L", -1}, {"G", -1}, {"D", p.dim}});
  p.kv_heads = cache.heads;
  p.heads = a.size(2) - 2 * p.kv_heads;
  EFFOPS_CHECK(p.heads >= 0, op, ": k_cache: expected G up to ", a.size(2) / 2, " for qkv ", a.shape(), ", got shape ",
               kc.shape());
  p.pages = cache.pages;
  p.limits = cache.limits();
  p.slots = slots_of(Arg(op, "slots", slots), a, cache, p.batch, p.tokens);
  p.angles = angles_of(a, a.size(0), a.size(1), p.dim, cos, sin, positions);
  a = with_contiguous_rows(op, "qkv", qkv);
  p.x = a.data();
  p.x_batch = a.stride(0);
  p.x_token = a.stride(1);
  p.x_head = a.stride(2);
  p.k = {kc.mutable_data(), kc.stride(0), kc.stride(1), kc.stride(2), p.dim == 1 ? 1 : kc.stride(3)};
  p.v = {vc.mutable_data(), vc.stride(0), vc.stride(1), vc.stride(2), p.dim == 1 ? 1 : vc.stride(3)};
  Tensor q = empty({p.batch, p.tokens, p.heads, p.dim}, a.type, a);
  p.q = Arg(op, "q", q).mutable_data();
  backend.run(&cpu::Kernels::rotary_append, &DeviceLibrary::rotary_append, p);
  return q;
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_append", TORCH_BOX(&rotary_append));
}

}  // namespace effops::ops
