// append_evicting: new tokens into caches of a fixed size.
#include "common/evict.h"

#include "ops/cache.h"

namespace effops::ops {
namespace {

RowView by_slot(const Arg& a) { return {a.mutable_data(), a.stride(0), a.stride(2), a.stride(1)}; }  // [B, G, L]

// Throws what the plan throws, where the host can read the values.
template <class M>
void check_room(EvictProblem p, const Arg& mass, const Arg& positions, const Arg& new_positions) {
  const Readable<M> masses(mass);
  const Readable<int32_t> held(positions), coming(new_positions);
  const auto view = [](const auto& r) {
    auto* data = const_cast<char*>(reinterpret_cast<const char*>(r.data()));
    return RowView{data, r.stride(0), r.stride(2), r.stride(1)};
  };
  p.mass = view(masses);
  p.positions = view(held);
  p.new_positions = {coming.data(), coming.stride(0), coming.stride(1)};
  plan_evictions(p, torch_threads());
}

void append_evicting(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor mass, Tensor positions,
                     Tensor new_positions, int64_t recent, int64_t num_sinks) {
  const char* op = "append_evicting";
  const Backend backend(op, k_cache);
  const Arg kc(op, "k_cache", k_cache), vc(op, "v_cache", v_cache), ka(op, "k", k), va(op, "v", v);
  const Arg masses(op, "mass", mass), held(op, "positions", positions), coming(op, "new_positions", new_positions);
  EvictProblem p;
  p.bytes = static_cast<int64_t>(size_of(kc.dtype()));
  ka.same_dtype(kc).same_device(kc);
  va.same_dtype(kc).same_device(kc);
  const CacheShape shape = cache_shape(kc, vc, std::nullopt, kc.rank(4, "[B, L, G, D]").size(0));
  p.batch = kc.size(0);
  p.slots = shape.capacity;
  p.heads = shape.heads;
  p.k_dim = kc.size(3);
  p.v_dim = vc.size(3);
  check_shape(ka, {{"B", p.batch}, {"T", -1}, {"G", p.heads}, {"D", p.k_dim}});
  p.tokens = ka.size(1);
  check_shape(va, {{"B", p.batch}, {"T", p.tokens}, {"G", p.heads}, {"Dv", p.v_dim}});
  p.mass_dtype = kc.dtype() == DType::f64 ? DType::f64 : DType::f32;
  masses.is(lse_type(kc.dtype()), name_of(p.mass_dtype)).same_device(kc);
  check_shape(masses, {{"B", p.batch}, {"G", p.heads}, {"L", p.slots}});
  held.is(type_int32(), "int32").same_device(kc);
  check_shape(held, {{"B", p.batch}, {"G", p.heads}, {"L", p.slots}});
  p.new_positions = token_indices(coming, kc, p.batch, p.tokens, -1, INT32_MAX);
  EFFOPS_CHECK(recent >= 1, op, ": recent: expected 1 or more, got ", recent);
  EFFOPS_CHECK(num_sinks >= 0, op, ": num_sinks: expected 0 or more, got ", num_sinks);
  p.recent = recent;
  p.num_sinks = num_sinks;
  if (backend.device() && backend.checks_values())
    p.mass_dtype == DType::f64 ? check_room<double>(p, masses, held, coming)
                               : check_room<float>(p, masses, held, coming);
  p.k = view4(ka, unconst(ka.data()));
  p.v = view4(va, unconst(va.data()));
  p.k_cache = view4(kc, kc.mutable_data());
  p.v_cache = view4(vc, vc.mutable_data());
  p.mass = by_slot(masses);
  p.positions = by_slot(held);
  if (p.batch * p.heads * p.tokens == 0) return;
  backend.device() ? backend.launch(&DeviceLibrary::append_evicting, p) : effops::append_evicting(p, torch_threads());
}

}  // namespace

EFFOPS_ON_EVERY_BACKEND(m) { m.impl("append_evicting", TORCH_BOX(&append_evicting)); }

}  // namespace effops::ops
