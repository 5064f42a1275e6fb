// append_kv on the CPU.
#include "common/append.h"
#include "ops/tensor.h"

namespace effops::ops {
namespace {

void append_rows(const Arg& cache, const Arg& rows, const TokenIndices& slots) {
  AppendProblem p;
  const int64_t bytes = size_of(rows.dtype());
  p.batch = rows.size(0);
  p.tokens = rows.size(1);
  p.heads = rows.size(2);
  p.dim = rows.size(3);
  p.bytes = bytes;
  p.from = rows.data();
  p.to = cache.mutable_data();
  p.slots = slots;
  for (int i = 0; i < 4; ++i) {
    p.from_stride[i] = rows.stride(i) * bytes;
    p.to_stride[i] = cache.stride(i) * bytes;
  }
  append_rows(p);
}

void append_kv(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor slots) {
  const char* op = "append_kv";
  const Arg kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache), ka(op, "k", k), va(op, "v", v);
  kc.dtype();
  kc.rank(4, "[B, L, G, D]");
  const int64_t batch = kc.size(0), capacity = kc.size(1), heads = kc.size(2);
  vc.same_dtype(kc).same_device(kc);
  check_shape(vc, {{"B", batch}, {"L", capacity}, {"G", heads}, {"Dv", -1}});
  ka.same_dtype(kc).same_device(kc);
  check_shape(ka, {{"B", batch}, {"T", -1}, {"G", heads}, {"D", kc.size(3)}});
  va.same_dtype(kc).same_device(kc);
  check_shape(va, {{"B", batch}, {"T", ka.size(1)}, {"G", heads}, {"Dv", vc.size(3)}});
  const TokenIndices at = token_indices(Arg(op, "slots", slots), kc, batch, ka.size(1), -1, capacity);
  append_rows(kc, ka, at);
  append_rows(vc, va, at);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv)); }

}  // namespace effops::ops
